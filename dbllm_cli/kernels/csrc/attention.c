#include "attention.h"

void attention_portable(const attention_head* head) { attention_any(head); }
