"""The time of the loss of votes, forward and backward, beside that of a loop over the questions.

    python tests/benchmarks/vote_loss.py [--device cuda] [--threads 1]

Each galaxy has votes for the questions of one survey, as in GZ Evo; then, as the worst case, for those of all surveys.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from zoobot_hf import load_survey, tree_layout
from zoobot_hf.models.votes import vote_loss

REPEATS = 50


def loop_loss(concentrations, votes, slices):
    losses = []
    for part in slices:
        a, k = concentrations[:, part], votes[:, part]
        total, volunteers = a.sum(1), k.sum(1)
        of_question = torch.lgamma(volunteers + 1) + torch.lgamma(total) - torch.lgamma(total + volunteers)
        of_answers = torch.lgamma(k + 1) + torch.lgamma(a) - torch.lgamma(a + k)
        losses.append(of_answers.sum(1) - of_question)
    return torch.stack(losses, 1).sum(1).mean()


def measure(loss, concentrations, votes):
    """The median time in milliseconds, the value and the gradient."""
    times = []
    for _ in range(REPEATS):
        given = concentrations.clone().requires_grad_()
        wait(given.device)
        start = time.perf_counter()
        value = loss(given, votes)
        value.backward()
        wait(given.device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times), value.item(), given.grad


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def draw_votes(surveys, batch, *, of_all_surveys):
    generator = np.random.default_rng(0)
    own = generator.integers(len(surveys), size=batch)
    parts = []
    for number, survey in enumerate(surveys):
        votes = generator.integers(0, 10, (batch, len(survey.vote_columns)))
        parts.append(votes if of_all_surveys else votes * (own == number)[:, None])
    return torch.tensor(np.concatenate(parts, axis=1), dtype=torch.float32)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())

    components = ("decals_dr12", "decals_dr5", "desi_dr8", "gz2", "candels", "hubble_v2", "cosmic_dawn", "euclid")
    surveys, tree = [load_survey(name) for name in components], load_survey("gz_evo_v2")
    layout = tree_layout(tree.to_dict())
    stops = np.cumsum([len(question.answers) for question in tree.questions])
    slices = [slice(stop - len(q.answers), stop) for stop, q in zip(stops, tree.questions, strict=True)]
    torch.manual_seed(0)
    concentrations = (torch.rand(options.batch, len(tree.vote_columns)) * 100 + 1).to(options.device)
    print(f"{len(slices)} questions, {len(tree.vote_columns)} answers, batch {options.batch}, {options.device}")
    print(f"{'votes of':16}{'loop':>12}{'vectorised':>12}{'ratio':>8}{'difference':>14}")
    for name, of_all_surveys in {"one survey": False, "all surveys": True}.items():
        votes = draw_votes(surveys, options.batch, of_all_surveys=of_all_surveys).to(options.device)
        loop, loop_value, loop_gradient = measure(lambda a, k: loop_loss(a, k, slices), concentrations, votes)
        fast, value, gradient = measure(lambda a, k: vote_loss(a, k, layout, reduction="sum"), concentrations, votes)
        torch.testing.assert_close(gradient, loop_gradient, rtol=1e-4, atol=1e-7)
        difference = abs(value - loop_value) / loop_value
        print(f"{name:16}{loop:9.2f} ms{fast:9.2f} ms{loop / fast:8.1f}{difference:14.1e}")


if __name__ == "__main__":
    main()
