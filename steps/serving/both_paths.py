"""What a trained run predicts by the two paths that a ranking model has: for whole windows, as it is trained and
evaluated, and for candidates against kept histories, as it is served.
"""

from pathlib import Path

import torch

from kernels.jagged import offsets_from_lengths
from kernels.jagged.naive import sequence_and_position
from steps.common.cli import StepError
from steps.data.sequences import Sequences
from steps.data.split import HeldOut, require_split, split_sequences
from steps.evaluation.engagements import Predictions
from steps.evaluation.ranking import RankingEvaluation
from steps.serving.ranker import CandidateRanker
from steps.serving.trained import open_run


def both_paths(
    run: Path | str, data: Path | str, part: str = "test", device: str = "cpu"
) -> tuple[Predictions, Predictions]:
    """The predictions for all held-out targets of a run: by windows, and by kept histories; in the same order.

    part: `test` or `valid`. Raises StepError as `CandidateRanker.from_run`, and if the run's protocol does not split by
    users: there the targets of a user are no candidates of one request.
    """
    trained = open_run(run, data, device)
    ranker, protocol = CandidateRanker.of(trained), trained.config["protocol"]
    if protocol["split"] != "users":
        raise StepError(
            f"{run}: protocol {protocol['name']} predicts each interaction after those before it, and has no requests "
            "with several candidates; take a run of upstream-ranking"
        )
    split = split_sequences(trained.sequences, protocol)
    require_split(trained.sequences, split, trained.config, trained.folder)
    held_out = split.held_out[part]
    with torch.inference_mode():
        windows = RankingEvaluation(trained.config, trained.sequences, held_out).predictions(ranker.task)
    training = trained.config["training"]
    logit = served_logits(ranker, trained.sequences, held_out, training["max_len"], training["batch"])
    return windows, windows._replace(logit=logit)


def served_logits(
    ranker: CandidateRanker, sequences: Sequences, held_out: HeldOut, max_len: int, batch: int
) -> torch.Tensor:
    """The logits (K,) of held-out targets: each user's are candidates of one request, at the time of the last
    interaction before them, against the latest `max_len` of the history. batch: so many users at once.
    """
    if sequences.rating is None:
        raise ValueError("the data set has no ratings, and histories are of rated items")
    found = torch.empty(len(held_out.users), device=sequences.item.device)
    targets = sequences.offsets[held_out.users + 1] - 1 - held_out.num_after
    for users in held_out.users.unique().split(batch):
        place = torch.nonzero(torch.isin(held_out.users, users))[:, 0]
        place = place[held_out.users[place].argsort(stable=True)]
        owner = torch.searchsorted(users, held_out.users[place])
        first = sequences.offsets[users + 1].scatter_reduce(0, owner, targets[place], "amin")
        begin = torch.maximum(sequences.offsets[users], first - max_len)
        histories = offsets_from_lengths(first - begin)
        row, position = sequence_and_position(histories, int(histories[-1]))
        index, names = begin[row] + position, users.tolist()
        features = {name: values[users] for name, values in sequences.user_features.items()}
        item, rating, time = (of[index] for of in (sequences.item, sequences.rating, sequences.timestamp))
        ranker.append(names, item, rating, time, histories.cpu(), features)
        requests = offsets_from_lengths(torch.bincount(owner, minlength=len(users))).cpu()
        found[place] = ranker.score(names, sequences.item[targets[place]], requests, sequences.timestamp[first - 1])
        ranker.evict(names)
    return found
