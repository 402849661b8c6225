"""Puts a fault into a copy of the code, one in each area, and runs the tests that must catch it.

    python -m scripts.check.faults                        all of them, two at a time
    python -m scripts.check.faults only=scan,decode       these
    python -m scripts.check.faults list=true              what they are
    more keys: jobs=2   out=runs/faults.json (results; those that are there already for the same fault and code are not run again)   again=true

A fault is a piece of text that stands once in the project's code (wherever that file lies now) and what replaces it. Exit status: 0 all were
caught, 1 one was not, or its text is no longer there: then give the fault the new text.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import write_json
from training.config.arguments import parse_arguments, program
from training.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CODE = ("data", "evals", "kernels", "models", "training", "train.py")
DEFAULTS: dict[str, Any] = {"only": None, "list": False, "jobs": 2, "out": "runs/faults.json", "again": False}


@dataclass(frozen=True)
class Fault:
    """what: the mistake in words; text: stands exactly once in the code; becomes: replaces it; tests: pytest arguments of tests that must
    fail."""

    what: str
    text: str
    becomes: str
    tests: str


FAULTS = {
    "kernels": Fault(
        "the kernel of SwiGLU gives up the gradient of another input",
        "tl.store(D_UP + j, (d * z * s)",
        "tl.store(D_UP + j, (d * u * s)",
        "tests/kernels/test_mixer_kernels.py -k interpreter",
    ),
    "solver": Fault(
        "the parallel solve certifies what is not converged",
        "if residual <= tolerance(cell, pre.dtype):",
        "if residual <= 1e6 * tolerance(cell, pre.dtype):",
        "tests/kernels/test_parallel_rnn.py",
    ),
    "scan": Fault(
        "the chunked scan lets a chunk's inputs decay by one step too many or too few",
        "to_end = F.pad(decay_BCHQ[..., 1:], (0, 1))",
        "to_end = F.pad(decay_BCHQ[..., :-1], (0, 1))",
        "tests/kernels/test_ssd.py",
    ),
    "conv": Fault(
        "the short convolution sees the document before",
        "y += torch.where(same[..., None], padded[:, w : w + T], 0.0)",
        "y += torch.where(torch.ones_like(same)[..., None], padded[:, w : w + T], 0.0)",
        "tests/models/test_numbers.py -k convolution",
    ),
    "norm": Fault(
        "the norm's written-out gradient sums where it must average",
        "(dn_G * n_G).mean(-1, keepdim=True)",
        "(dn_G * n_G).sum(-1, keepdim=True)",
        "tests/kernels/test_mixer_kernels.py -k operations",
    ),
    "loss": Fault(
        "the loss has no gradient through the log-partition",
        ".mul_((g_nll_N + g_log_z_N)[:, None])",
        ".mul_(g_nll_N[:, None])",
        "tests/models/test_numbers.py -k head tests/models/test_lm.py tests/kernels/test_odd_inputs.py",
    ),
    "rotary": Fault(
        "rotary positions turn the second half of a head the other way",
        "b * cos + a * sin, x[..., 2 * J :]",
        "b * cos - a * sin, x[..., 2 * J :]",
        "tests/models/test_against_transformers.py",
    ),
    "decode": Fault(
        "a decoding step of Mamba-2 does not let its state decay",
        "decayed = h0.to(dtype) * decay_BH[..., None, None]",
        "decayed = h0.to(dtype) * torch.ones_like(decay_BH)[..., None, None]",
        "tests/models/test_contract.py -k without_gradients",
    ),
    "sampling": Fault(
        "top-p leaves out the token that crosses the threshold",
        "before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)",
        "before = ordered.softmax(-1).cumsum(-1)",
        "tests/models/test_lm.py -k top_p",
    ),
    "loader order": Fault(
        "every epoch has the same order",
        "Permutation(self.windows[source], self.seed, source, epoch)",
        "Permutation(self.windows[source], self.seed, source, 0)",
        "tests/data/test_order_and_loader.py",
    ),
    "shards": Fault(
        "a document's start is put in the wrong place behind a border of shards",
        "segments_L[begun + done] = 1",
        "segments_L[begun] = 1",
        "tests/data/test_order_and_loader.py",
    ),
    "checkpoint": Fault(
        "a checkpoint with a flipped bit passes",
        'if digest(path) != entry.get("sha256"):',
        "if not digest(path):",
        "tests/training/test_runs.py -k damaged_checkpoint",
    ),
    "resume": Fault(
        "a run that goes on counts its samples from steps and today's batch",
        'return Cursor(order, state["step"], state["samples"],',
        'return Cursor(order, state["step"], state["step"] * config.train.global_batch,',
        "tests/training/test_resume.py -k batches",
    ),
    "ZeRO": Fault(
        "every rank takes up the moments of the first rank's stretch",
        's.values.copy_(read(f"{key}.{s.name}", s.first, s.end))',
        's.values.copy_(read(f"{key}.{s.name}", 0, s.end - s.first))',
        "tests/training/test_checkpoint.py -k four_ranks",
    ),
    "schedule": Fault(
        "the warm-up begins at zero",
        "return min(1.0, (step + 1) / warmup)",
        "return min(1.0, step / warmup)",
        "tests/training/test_schedule.py",
    ),
    "optimizer": Fault(
        "weight decay goes to what is tagged no_decay",
        '"no_decay" not in roles(parameter) and parameter.ndim >= 2',
        "parameter.ndim >= 2",
        "tests/models/test_lm.py -k decay",
    ),
    "parallel": Fault(
        "adjoints stop at the border of the next rank's slice",
        "final = starts[n] + ",
        "final = starts[n] + 0 * ",
        "tests/parallel/test_sequence.py",
    ),
    "export": Fault(
        "an exported folder loses the fp32 of recurrence parameters",
        'others = {name: torch.float32 for name, p in model.named_parameters() if roles(p).get("keep_fp32")}',
        "others = {}",
        "tests/hub/test_custom_export.py tests/hub/test_native_export.py",
    ),
    "evals": Fault(
        "bits per byte are bits per token",
        "return self.nll_nats / math.log(2) / self.bytes",
        "return self.nll_nats / math.log(2) / self.tokens",
        "tests/evals/test_perplexity.py",
    ),
    "config message": Fault(
        "a key that belongs to another group is answered with the first key there is",
        "same = [leaves[leaf] for leaf in difflib.get_close_matches(last, list(leaves), n=1, cutoff=0.8)]",
        "same = [leaves[leaf] for leaf in list(leaves)[:1]]",
        "tests/training/test_settings.py",
    ),
}


def place(fault: Fault) -> Path:
    """The file (from the root) that holds the fault's text. Raises UserError unless it stands there once."""
    files = [file for name in CODE for file in ([ROOT / name] if name.endswith(".py") else sorted((ROOT / name).rglob("*.py")))]
    holders = [(file, n) for file in files if (n := file.read_text().count(fault.text))]
    if sum(n for _, n in holders) != 1:
        where = ", ".join(str(file.relative_to(ROOT)) for file, _ in holders) or "nowhere"
        raise UserError(f"The text {fault.text!r} must stand once in the code; it stands in {where}. Give the fault another text.")
    return holders[0][0].relative_to(ROOT)


def copy_of_the_project(folder: Path) -> None:
    """The files that git knows or would add."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("docs/results/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def try_out(fault: Fault) -> tuple[str, str]:
    """('caught' | 'not caught' | 'broken', the first failure or the end of what pytest said)."""
    with tempfile.TemporaryDirectory(prefix="fault_") as temporary:
        folder = Path(temporary)
        file = place(fault)
        copy_of_the_project(folder)
        (folder / file).write_text((folder / file).read_text().replace(fault.text, fault.becomes))
        words = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--tb=line", *fault.tests.split()]
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "TRITON_CACHE_DIR": str(folder / ".triton")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode == 1 and failures and failures[0].startswith("FAILED"):
        return "caught", failures[0]
    return ("not caught" if done.returncode == 0 else "broken"), (done.stdout + done.stderr)[-1500:]


def state_of_the_code() -> str:
    """A hash of the code and the tests as they lie there."""
    digest = hashlib.sha256()
    for file in sorted(
        file for name in (*CODE, "tests", "configs") for file in (ROOT / name).rglob("*") if file.suffix in (".py", ".yaml")
    ):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def main(words: list[str], faults: dict[str, Fault] = FAULTS, out: str = DEFAULTS["out"]) -> int:
    """The program on a table of faults; out: where results go unless `words` say so."""
    options = parse_arguments(words, {**DEFAULTS, "out": out})
    chosen = options["only"].split(",") if options["only"] else list(faults)
    if unknown := [name for name in chosen if name not in faults]:
        raise UserError(f"There is no fault {unknown[0]!r}; there are {', '.join(faults)}.")
    if options["list"]:
        for name in chosen:
            print(f"{name:<15} {faults[name].what} ({place(faults[name])})")
        return 0
    file, code = ROOT / options["out"], state_of_the_code()
    results = json.loads(file.read_text()) if file.exists() else {}

    def known(name: str) -> bool:
        return not options["again"] and results.get(name, {}).get("code") == code

    def run(name: str) -> None:
        outcome, why = try_out(faults[name])
        print(f"{name:<15} {outcome}: {why}", flush=True)
        results[name] = {"outcome": outcome, "why": why, "what": faults[name].what, "code": code}
        write_json(file, results)

    for name in chosen:
        place(faults[name])
    file.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options["jobs"]) as pool:
        list(pool.map(run, [name for name in chosen if not known(name)]))
    missed = [name for name in chosen if results[name]["outcome"] != "caught"]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults were caught{'; not: ' + ', '.join(missed) if missed else ''}.")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(program(__doc__, main))
