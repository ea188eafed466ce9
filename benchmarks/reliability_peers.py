"""The same kills for what writes models elsewhere: what does a reader find where an output was being replaced?

    python benchmarks/reliability_peers.py --results FILE.jsonl

transformers' save_pretrained, torch.distributed.checkpoint's save and a mergekit merge write over an older output of
their own, and are killed before each call that changes the disk, one kill a trial; so is a lapis graft. Then the output
is read in the usual way: it is the old one, the new one, an error, or, worst, neither without a word.
Needs transformers and mergekit beside lapis, and a C compiler on Linux.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.reliability.aimed import CHANGING, Forks, build  # noqa: E402
from tests.reliability.jobs import make_inputs  # noqa: E402

MODULES = ("transformers.models.qwen3.modeling_qwen3", "torch.distributed.checkpoint", "mergekit.merge",
           "mergekit.scripts.run_yaml", "transformers.models.auto.tokenization_auto")  # fmt: skip
_OPEN = "import transformers\nmodel = transformers.AutoModelForCausalLM.from_pretrained({source!r})\n"
_SHOW = (
    "import hashlib\ntotal = hashlib.sha256()\n"
    "for name, value in sorted(state.items()): total.update(name.encode() + value.float().numpy().tobytes())\n"
    "print(total.hexdigest())\n"
)
_READ = _OPEN.format(source="out") + "state = model.state_dict()\n" + _SHOW
_SAVE_DCP = (
    "import torch.distributed.checkpoint as dcp\n"
    "dcp.save({{'model': model.state_dict()}}, checkpoint_id='out', no_dist=True)\n"
)
_READ_DCP = (
    _OPEN.format(source="../inputs/onto")
    + "import torch.distributed.checkpoint as dcp\nstate = {'model': model.state_dict()}\n"
    "dcp.load(state, checkpoint_id='out', no_dist=True)\nstate = state['model']\n" + _SHOW
)
_MERGE = (
    "from mergekit.config import MergeConfiguration\nfrom mergekit.merge import run_merge\n"
    "from mergekit.options import MergeOptions\n"
    "models = [{{'model': '../inputs/' + name, 'parameters': {{'weight': {weight}}}}} for name in ('chat', 'onto')]\n"
    "recipe = {{'merge_method': 'task_arithmetic', 'base_model': '../inputs/base', 'models': models}}\n"
    "run_merge(MergeConfiguration.model_validate(recipe), 'out', MergeOptions(quiet=True))\n"
)
_GRAFT = (
    "from lapis.cli.main import main\nmain(['graft', '--base', '../inputs/base', '--chat', '../inputs/chat', '--onto', "
    "'../inputs/onto', '--scale', '{weight}', '--overwrite', '--no-smoke', '--out', 'out'])\n"
)
# name -> what writes the old output, what writes the new one over it, what reads
PEERS: dict[str, tuple[str, str, str]] = {
    "lapis: graft --overwrite": (_GRAFT.format(weight=0.5), _GRAFT.format(weight=1.0), _READ),
    "transformers: save_pretrained": (
        _OPEN.format(source="../inputs/base") + "model.save_pretrained('out')\n",
        _OPEN.format(source="../inputs/chat") + "model.save_pretrained('out')\n", _READ,
    ),
    "torch.distributed.checkpoint: save": (
        _OPEN.format(source="../inputs/base") + _SAVE_DCP.format(), _OPEN.format(source="../inputs/chat")
        + _SAVE_DCP.format(), _READ_DCP,
    ),
    "mergekit: a merge": (_MERGE.format(weight=0.5), _MERGE.format(weight=1.0), _READ),
}  # fmt: skip


def compare(forks: Forks, place: Path, old: str, new: str, read: str) -> Mapping[str, int]:
    """What readers find after a kill at each call that changes the disk."""
    folder, kept = place / "work", place / "kept"
    for path in (folder, kept):
        shutil.rmtree(path, ignore_errors=True)
    folder.mkdir()

    def seen() -> str:
        ended = forks.run(["-c", read], folder)
        return ended.shown.strip() if ended.status == 0 else ""

    def run(script: str, **armed: object) -> None:
        ended = forks.run(["-c", script], folder, **armed)
        assert ended.status == 0 or ended.was_killed, ended.told[-500:]

    run(old)
    shutil.copytree(folder, kept)
    before = seen()
    log = forks.scratch / "peer-calls"
    log.unlink(missing_ok=True)
    limits = {"FAULT_UNDER": f"{folder}/", "FAULT_KINDS": ",".join(CHANGING)}
    run(new, FAULT_LOG=log, **limits)
    after, count = seen(), len(log.read_text().splitlines())
    assert before and after and before != after
    result: Counter[str] = Counter()
    for number in range(1, count + 1):
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        run(new, FAULT_AT=number, **limits)
        found = seen()
        result["kills"] += 1
        result["error" if not found else "old" if found == before else "new" if found == after else "neither"] += 1
    return result


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--results", type=Path, help="a .jsonl to which each result is appended")
    options.add_argument("--only", nargs="*", default=[])
    given = options.parse_args()
    place = Path(tempfile.mkdtemp(prefix="lapis-peers-"))
    forks = Forks(build(place), place, MODULES)
    try:
        (place / "jobs").mkdir()
        make_inputs(forks, place / "jobs" / "inputs")
        for name, scripts in PEERS.items():
            if given.only and not any(word in name for word in given.only):
                continue
            row = {"peer": name, **compare(forks, place / "jobs", *scripts)}
            print(json.dumps(row), flush=True)
            if given.results:
                with given.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    finally:
        forks.close()
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
