# SPDX-License-Identifier: GPL-3.0-only
"""
Measurements: the numbers for which the README names a `python -m bench` command.

    python -m bench                     # what there is
    python -m bench generate --help     # what a bench does, and its settings
"""
import importlib

from runtime.console import UserError, command_line, show
from runtime.settings import load

BENCHES = {  # each is a file here, with a class Settings and a function main(settings, arguments)
    "doctor": "is this machine fit to train?",
    "walkthrough": "what happens to one batch and one prompt, number by number?",
    "parity": "does training here match nanoGPT's, loss by loss?",
    "loss": "how soon does a model reach nanoGPT's loss?",
    "throughput": "how fast is a training step, and how much memory does it take?",
    "ablation": "what does each idea of the model gain?",
    "scaling": "how good will a long run be?",
    "generate": "how fast is a text written, here and by other programs?",
    "serve": "how fast is the server with 1, 4 and 16 clients?",
}


def main(argv):
    name = argv[0] if argv else "--help"
    if name in ("--help", "-h"):
        show("\n".join(f"python -m bench {name:12}{question}" for name, question in BENCHES.items()))
        return 0
    if name not in BENCHES:
        raise UserError(f"there is no bench {name!r}", "python -m bench NAME, one of: " + ", ".join(BENCHES))
    bench = importlib.import_module(f"bench.{name}")
    settings, _, arguments = load(bench.Settings, argv[1:])
    return bench.main(settings, arguments)


if __name__ == "__main__":
    command_line(main)
