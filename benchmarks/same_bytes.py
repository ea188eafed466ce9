"""The same jobs with two versions of lapis: whose files differ, and does a job that one left unfinished go on.

    python benchmarks/same_bytes.py make DIR > before.txt       with the older lapis on the path: every job, into DIR
    python benchmarks/same_bytes.py interrupt DIR               also with the older: a merge and a training that are cut
    python benchmarks/same_bytes.py make DIR --against before.txt
    python benchmarks/same_bytes.py resume DIR --against before.txt      with the newer: both go on and are compared

`make` prints name and sha256 of every file, and with --against only a line for each file that differs; the exit status
is 1 where one does. Models are small and random, from a seed; everything runs on one thread. Files that hold times
(a run's log) are left out. The accounts that lapis writes hold the names of the inputs, so both runs use one DIR.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import save_file

LAYERS, DIM, FFN = 4, 64, 96
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEXTS = (
    "the cat sat on the mat and the dog ran away from it all again",
    "kucing duduk di atas tikar dan anjing lari dari semua itu lagi",
)
WITH_TIMES = ("log.jsonl", "lapis-manifest.json", "report.html", "lapis-train.json", "training.json", "README.md")
METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "linear": (("one", "two"), {"weight": 0.6}),
    "task_arithmetic": (("one", "two"), {"weight": 0.6, "lambda": 0.9}),
    "ties": (("one", "two"), {"weight": 0.6, "density": 0.5}),
    "dare_linear": (("one", "two"), {"weight": 0.6, "density": 0.5}),
    "dare_ties": (("one", "two"), {"weight": 0.6, "density": 0.5}),
    "della": (("one", "two"), {"weight": 0.6, "density": 0.5, "epsilon": 0.1}),
    "della_linear": (("one", "two"), {"weight": 0.6, "density": 0.5, "epsilon": 0.1}),
    "breadcrumbs": (("one", "two"), {"weight": 0.6, "density": 0.8, "gamma": 0.02}),
    "breadcrumbs_ties": (("one", "two"), {"weight": 0.6, "density": 0.8, "gamma": 0.02}),
    "slerp": (("one",), {"t": [0, 0.5, 0.3, 1]}),
    "nuslerp": (("one", "two"), {"weight": 0.6}),
    "multislerp": (("one", "two"), {"weight": 0.6}),
    "karcher": (("one", "two"), {}),
    "model_stock": (("one", "two"), {}),
    "nearswap": (("one",), {"t": 0.001}),
    "sce": (("one", "two"), {"select_topk": 0.4}),
    "arcee_fusion": (("one",), {}),
    "ram": (("one", "two"), {}),
    "ramplus_tl": (("one", "two"), {}),
    "passthrough": (("one",), {"scale": 0.5}),
}
WITHOUT_BASE = ("linear", "karcher", "passthrough")


def drawn(seed: int, vocab: int, *, dim: int = DIM, ffn: int = FFN, layers: int = LAYERS) -> dict[str, torch.Tensor]:
    """A Llama of random weights in bfloat16, its head tied."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=random) * 0.05).bfloat16()

    tensors = {"model.embed_tokens.weight": draw(vocab, dim), "model.norm.weight": draw(dim) + 1}
    for i in range(layers):
        shapes = {
            "self_attn.q_proj": (dim, dim), "self_attn.k_proj": (dim // 2, dim), "self_attn.v_proj": (dim // 2, dim),
            "self_attn.o_proj": (dim, dim), "mlp.gate_proj": (ffn, dim), "mlp.up_proj": (ffn, dim),
            "mlp.down_proj": (dim, ffn),
        }  # fmt: skip
        tensors |= {f"model.layers.{i}.{part}.weight": draw(*shape) for part, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = draw(dim) + 1
    return tensors


def near(tensors: dict[str, torch.Tensor], seed: int, rows: int | None = None) -> dict[str, torch.Tensor]:
    """A fine-tune of `tensors`; rows: of its embedding, where these differ."""
    random = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in tensors.items():
        if rows and name == "model.embed_tokens.weight":
            tensor = torch.cat([tensor, tensor[: max(rows - len(tensor), 0)]])[:rows]
        result[name] = (tensor.float() + 0.01 * torch.randn(tensor.shape, generator=random)).bfloat16()
    return result


def write_tokenizer(folder: Path, text: str, *, template: str = "", ends: str = "<|endoftext|>") -> int:
    """A byte-level BPE that was trained on one line; returns how many tokens it has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    bpe.train_from_iterator([text] * 3, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": ends}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | ({"chat_template": template} if template else {}))
    )
    return bpe.get_vocab_size()


def write_model(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Weights and config.json in a folder that may hold a tokenizer already."""
    rows, dim = tensors["model.embed_tokens.weight"].shape
    ffn, layers = tensors["model.layers.0.mlp.up_proj.weight"].shape[0], sum("q_proj" in name for name in tensors)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": dim, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": dim // 4,
        "vocab_size": rows, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
        "torch_dtype": "bfloat16", "hidden_act": "silu", "rope_theta": 10000.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    placed = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(placed.values())):
        save_file({n: t for n, t in tensors.items() if placed[n] == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_inputs() -> None:
    """Every input, once: base, three fine-tunes of it, one with other tokens, large ones, an adapter, texts."""
    if Path("models").is_dir():
        return
    place = Path("models.tmp")
    shutil.rmtree(place, ignore_errors=True)
    folders = {name: place / name for name in ("base", "one", "two", "onto", "other", "big", "big-one", "big-two")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    rows = {}
    for name, folder in folders.items():
        template = TEMPLATE if name in ("one", "other") else ""
        rows[name] = write_tokenizer(
            folder, TEXTS[name == "other"], template=template, ends="<|im_end|>" if template else "<|endoftext|>"
        )
    base = drawn(1, rows["base"])
    write_model(folders["base"], base)
    for seed, name in enumerate(("one", "two", "onto", "other"), 2):
        write_model(folders[name], near(base, seed, rows[name]), shards=2 if name == "onto" else 1)
    big = drawn(9, rows["big"], dim=1024, ffn=2048, layers=8)
    write_model(folders["big"], big)
    write_model(folders["big-one"], near(big, 10))
    write_model(folders["big-two"], near(big, 11))
    write_adapter(place / "adapter")
    with (place / "texts.jsonl").open("w", encoding="utf-8") as file:
        for i in range(200):
            file.write(json.dumps({"text": f"{TEXTS[i % 2]} {i} {TEXTS[(i + 1) % 2]}"}) + "\n")
    place.rename("models")


def write_adapter(folder: Path) -> None:
    """LoRA of rank 4 on q and v of every layer, as PEFT writes it."""
    folder.mkdir()
    random, tensors = torch.Generator().manual_seed(7), {}
    for i in range(LAYERS):
        for module, rows in (("q_proj", DIM), ("v_proj", DIM // 2)):
            stem = f"base_model.model.model.layers.{i}.self_attn.{module}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4, DIM, generator=random) * 0.1
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=random) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "base_model_name_or_path": "models/base", "r": 4, "lora_alpha": 8,
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "v_proj"], "bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def recipe(method: str, **more: Any) -> dict[str, Any]:
    names, parameters = METHODS[method]
    document: dict[str, Any] = {
        "merge_method": method, "models": [{"model": f"models/{name}"} for name in names], "parameters": parameters,
    }  # fmt: skip
    if method not in WITHOUT_BASE:
        document["base_model"] = "models/base"
    return document | more


def jobs() -> dict[str, Callable[[str], Any]]:
    """Name of an output -> what makes it."""
    import lapis

    trio = {"base": "models/base", "chat": "models/one", "onto": "models/onto"}
    stack = {
        "merge_method": "passthrough", "dtype": "float32",
        "slices": [
            {"sources": [{"model": "models/base", "layer_range": [0, 3]}]},
            {"sources": [{"model": "models/one", "layer_range": [1, 4]}]},
        ],
    }  # fmt: skip
    union = {
        "merge_method": "linear", "tokenizer_source": "union", "dtype": "bfloat16",
        "models": [{"model": f"models/{name}", "parameters": {"weight": 0.5}} for name in ("one", "other")],
    }  # fmt: skip
    result: dict[str, Callable[[str], Any]] = {
        "graft": lambda out: lapis.graft(**trio, out=out),
        "graft-scaled": lambda out: lapis.graft(
            **trio, out=out, scale="default=0.5,0-1=0.2,attn=1.0,3.mlp=0", embeddings="add", norms="add"
        ),
        "graft-two": lambda out: lapis.graft(
            "models/base", ["models/one", "models/two"], "models/onto", out, scale=[1.0, 0.5], template="onto"
        ),
        "union": lambda out: lapis.merge(union, out),
        "slices": lambda out: lapis.merge(stack, out),
        "expression": lambda out: lapis.merge("models/onto + 0.8*(models/one - models/base)", out),
        "fuse": lambda out: command("fuse", "models/adapter", "--out", out),
        "train": lambda out: command("train", write_settings(out)),
    }
    return result | {
        f"merge-{method}": lambda out, method=method: lapis.merge(recipe(method), out, seed=5)  # type: ignore[misc]
        for method in METHODS
    }


def write_settings(out: str) -> str:
    """The settings of a training of 50 steps, as a file."""
    settings = {
        "objective": "causal", "model": "models/base", "data": "models/texts.jsonl", "context": 32, "out": out,
        "steps": 50, "batch": 4, "lr": 3e-3, "threads": 1, "precision": "float32", "save_every": 10, "log_every": 5,
        "sample_every": 0, "compile": "off", "seed": 3,
    }  # fmt: skip
    path = f"{out}.yaml"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(settings))
    return path


def command(*words: str) -> str:
    """`lapis` with these words; returns what it prints. Raises CalledProcessError where it fails."""
    done = subprocess.run([sys.executable, "-m", "lapis", *words], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
    done.check_returncode()
    return done.stdout


def hashes(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, sha256) of the files of one output that hold no times."""
    timed = WITH_TIMES if folder.name.startswith("train") else ()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if not name.startswith(timed):
            yield f"{folder.name}/{name}", hashlib.sha256(path.read_bytes()).hexdigest()


def make() -> dict[str, str]:
    """Every job, anew; the hashes of what it wrote."""
    import lapis

    write_inputs()
    shutil.rmtree("out", ignore_errors=True)
    result = {}
    for name, job in jobs().items():
        job(f"out/{name}")
        result |= dict(hashes(Path("out", name)))
    table = lapis.diff("models/base", "models/one", rows=True).to_json()
    result["diff.json"] = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
    return result


def interrupt() -> None:
    """A large merge that is killed past its first 64 MB, and a training that is killed past step 20."""
    write_inputs()
    shutil.rmtree("cut", ignore_errors=True)
    Path("cut").mkdir()
    pid = os.fork()
    if pid == 0:
        import lapis

        def stop(done: int, _total: int) -> None:
            if done > 100 << 20:
                os.kill(os.getpid(), signal.SIGKILL)

        lapis.merge(large(), "cut/merge", seed=5, progress=stop)
        os._exit(0)
    os.waitpid(pid, 0)
    run = subprocess.Popen([sys.executable, "-m", "lapis", "train", write_settings("cut/train")],
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    while run.poll() is None and not any(Path("cut").rglob("step-20*")):
        time.sleep(0.005)
    run.kill()
    run.wait()
    for name in ("merge", "train"):
        print(f"{name}: {'ended before it was cut' if Path('cut', name).exists() else 'cut'}")


def large() -> dict[str, Any]:
    names = ("models/big-one", "models/big-two")
    return {
        "merge_method": "ties", "base_model": "models/big", "models": [{"model": name} for name in names],
        "parameters": {"weight": 0.6, "density": 0.5},
    }  # fmt: skip


def resume() -> dict[str, str]:
    """Copies of what was interrupted, gone on with; their hashes, under the names of the whole jobs."""
    import lapis

    result = {}
    shutil.rmtree("resumed", ignore_errors=True)
    shutil.copytree("cut", "resumed", symlinks=True)
    done = lapis.merge(large(), "resumed/merge", seed=5)
    print(f"merge: went on from {done.bytes_resumed:,} of {done.bytes_resumed + done.bytes_written:,} bytes")
    shutil.rmtree("whole", ignore_errors=True)
    lapis.merge(large(), "whole/merge", seed=5)
    differ = [name for name, sha in hashes(Path("resumed/merge")) if dict(hashes(Path("whole/merge")))[name] != sha]
    print(f"merge: {len(differ)} files differ from those of a merge that was not cut {differ}")
    shutil.copyfile("cut/train.yaml", "resumed/train.yaml")
    Path("resumed/train.yaml").write_text(Path("cut/train.yaml").read_text().replace("cut/train", "resumed/train"))
    command("train", "resumed/train.yaml")
    rows = [json.loads(line) for line in Path("resumed/train/log.jsonl").read_text().splitlines()]
    print(f"train: {len(rows)} lines in its log; the last of step {rows[-1].get('step')}")
    return result | dict(hashes(Path("resumed/train")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("mode", choices=["make", "interrupt", "resume"])
    parser.add_argument("place", metavar="DIR")
    parser.add_argument("--against", metavar="FILE", help="what `make` printed before")
    options = parser.parse_args()
    torch.set_num_threads(1)
    against = (
        dict(line.split()[::-1] for line in Path(options.against).read_text().splitlines()) if options.against else None
    )
    Path(options.place).mkdir(parents=True, exist_ok=True)
    os.chdir(options.place)
    if options.mode == "interrupt":
        interrupt()
        return 0
    result = make() if options.mode == "make" else resume()
    if against is None:
        for name, sha in result.items():
            print(sha, name)
        return 0
    known = set(against) if options.mode == "make" else set(result)
    differ = sorted(name for name in known | set(result) if result.get(name) != against.get(name))
    for name in differ:
        print(f"differs: {name}")
    print(f"{len(result) - len(differ)} of {len(result)} files are the same")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
