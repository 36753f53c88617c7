"""The plan that ``paramdelta recycle --example`` prints."""

EXAMPLE = """\
# Recycling: version i is fine-tuned from m_i + alpha * delta_(i-1); its delta, tuned - m_i, goes on to version i + 1.
# Relative paths begin at the folder of this file.

versions:                  # of one base model, the oldest first: folders, or org/name[@revision] on the Hub
  - base-v1
  - base-v2
  - model: base-2026-03
    name: v3               # for folders and for {version}; by default the last part of the path

out: recycled              # the folder to work in: starts/, outs/, deltas/, logs/ and recycle.json

command:                   # fine-tunes the checkpoint {start} and leaves the tuned one, whole, in {out}
  - python
  - finetune.py
  - --model={start}
  - --output={out}
  - --run-name=chat-{version}
# shell: true              # then command is one text for /bin/sh
# workdir: .               # where the command runs
# env: {WANDB_PROJECT: recycling}    # beside PARAMDELTA_START, _OUT, _VERSION and _INDEX

# alpha: 1.0               # scale of each delta when it is applied; or globs: {"*": 1.0, "lm_head*": 0}
# first_delta: deltas/chat # added to the first version; by default that is fine-tuned as it is
# extract: {dtype: f32}    # options of paramdelta extract
# apply: {vocab: extend}   # options of paramdelta apply

keep: [outs]               # what stays beside deltas once a version is done: starts, outs, both, or []
unfinished: remove         # what a failed or interrupted command left in {out}; keep: the command continues from it
"""
