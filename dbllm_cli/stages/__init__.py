"""The stages: what each is (`spec`) and one body per stage."""
