"""Plans a model for devices that are not here: differs from tensor_parallel.py in that nothing is allocated or run.

Without arguments the devices are four virtual ones. With libtpu (pip install 'mistral-eqx[tpu]') they may be those of a
TPU, and no TPU is needed: plan.py 7b-v0.2 v4:2x2x4
"""

import sys

import rich

import mistral_eqx as mx
from mistral_eqx.planning import table


def main(name="gpt-mini", topology=None, devices=4):
    place = {"devices": devices} if topology is None else {"topology": topology}
    reports = []
    for strategy in (mx.HEADS, mx.HEAD_DIM, mx.HEADS_X_KV_SEQ):
        try:
            reports.append(mx.plan(name, **place, strategy=strategy, batch=2, prompt=64, kv_seq=256))
        except ValueError as error:
            print(error)
    rich.print(table(reports))
    for report in reports:
        # The same figures by name, for a program.
        sums = ", ".join(f"{one.count} {one.kind} of {one.bytes:,} bytes" for one in report["decode"].exchanges)
        print(f"{report.strategy}: each new token takes {sums}")


if __name__ == "__main__":
    main(*sys.argv[1:])
