import torch

from dbllm_cli.blockwise.streams import BlockStreams, entering_batch

CHOSEN = torch.tensor([7, 2, 31])
STREAMS = BlockStreams(torch.full((32, 400, 3), 1.0), torch.full((32, 400, 3), 2.0))


def entering(share: float, seed: int = 0) -> torch.Tensor:
    return entering_batch(STREAMS, CHOSEN, share, torch.Generator().manual_seed(seed))


def test_every_token_enters_whole_from_one_stream_or_the_other() -> None:
    batch = entering(0.25)
    assert batch.shape == (3, 400, 3)
    assert (batch == batch[..., :1]).all()
    teachers = (batch[..., 0] == 1.0).float().mean(-1)
    assert ((teachers - 0.25).abs() < 0.1).all()


def test_no_share_gives_the_students_tokens_and_all_of_it_the_teachers() -> None:
    assert torch.equal(entering(0.0), STREAMS.student[CHOSEN])
    assert torch.equal(entering(1.0), STREAMS.teacher[CHOSEN])


def test_the_generator_alone_draws_the_tokens() -> None:
    torch.manual_seed(5)
    first = entering(0.5)
    torch.manual_seed(6)
    assert torch.equal(entering(0.5), first)
    assert not torch.equal(entering(0.5, seed=1), first)
