"""Asks the planner which layout is best: differs from plan.py in that all layouts are estimated, and none is compiled.

By default for Mistral 7B on 16 chips v5e; another model and topology: best_layout.py small-3.1-24b H100:8
"""

import sys

import rich

from mistral_eqx.planning import Training, rank, ranking_table


def main(model="7b-v0.3", topology="v5e:4x4"):
    # Two users of a model, and someone who trains it.
    latency = rank(model, topology=topology, objective="latency", batch=1, prompt=512, kv_seq=2048)
    throughput = rank(model, topology=topology, objective="throughput", prompt=512, kv_seq=2048)
    training = rank(model, topology=topology, objective="train", batch=64, train=Training(seq=2048))
    for ranking in (latency, throughput, training):
        rich.print(ranking_table(ranking, most=3))
        print()
    first, second = latency.best[:2]
    print(f"{first.label} takes {first.seconds / second.seconds:.0%} of the time of {second.label}.")


if __name__ == "__main__":
    main(*sys.argv[1:])
