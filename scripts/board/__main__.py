"""The board: what each architecture is worth at equal tokens, on one page that anyone can run again (docs/board/protocol.md).

    python -m scripts.board corpus input=corpus.jsonl.xz data=DIR           order, tokenizer, held-out set and shards of the corpus, once
    python -m scripts.board plan data=DIR                                   the models, how they are counted, and the cells known so far
    python -m scripts.board compile data=DIR rows=gdn,mamba2                kernels of these rows, all at once, before their first cells
    python -m scripts.board run data=DIR minutes=25                         runs cells until time is up; again, or `resume`: goes on
    python -m scripts.board run data=DIR only=grid.gdn.0.002.0              one cell by its name
    python -m scripts.board again data=DIR only=grid.gdn.0.002.0            a finished cell once more: are its bits the same?
    python -m scripts.board beside data=DIR rows=gdn streams=3              what 1, 2 and 3 cells of a row make together on one GPU
    python -m scripts.board draw out=DIR                                    table, plots and log in docs/board
    python -m scripts.board export out=DIR only=CELL                        a trained cell as a folder for transformers, its numbers in the card

Keys
  data        the shards [runs/board/data]                     size      25m, 125m or tiny [25m]
  out         results: cells/, under_way/, attempts.jsonl      rows      architectures with commas between, or all [all]
  stages      stage0,time0,stage1,time1,grid,speed,pass,time,probe,leaders,speedrun  seeds     decisive rows have five from three on [3]
  first       stages whose cells this program takes before those that the plan has in front
  rates       true: of stages 0 and 1 only the cells that choose a row's rate [false]
  minutes     after which cells are saved and stopped; 0: run until nothing is left [0]
  whole       true: begins no cell that would not end in time, by what others took [false]
  spare       of the time that is left, seconds that whole=true does not count on: other programs, a halt of this one [0]
  workers     processes, over all GPUs in turn [1]              streams   cells a process keeps going [1]
  gpu         the GPU that `again` uses [0]                    others    other programs on the same device, beside which no speed counts [0]
  speedrun_tokens, speedrun_lr                                  of the cells of stages=speedrun
  only        names of cells with commas between               weights   true: keep the models of text that more is read off (stage 0: not), or named by only [false]
  device      auto, cpu or cuda [auto]                         precision bf16 (on a GPU) or fp32 [bf16]
  page        where the page is drawn, and results are kept [docs/board]
            input, part, vocabulary, tokenizer, join: of corpus (scripts/board/corpus.py)

Cells of the same settings are never run twice. A cell is finished (a file in OUT/cells, after `draw` a line of PAGE/cells.jsonl), under way, or not
begun, and every attempt is a line of attempts.jsonl. Whether streams=2 is quicker than one cell after the other depends on the rows: `beside` measures it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from data.fields import nearest
from data.files import check_writable, finite
from training.config.arguments import parse_arguments, program
from training.errors import UserError

DEFAULTS: dict[str, Any] = {
    "data": "runs/board/data",
    "out": "runs/board",
    "page": "docs/board",
    "size": "25m",
    "rows": "all",
    "stages": "all",
    "first": "",
    "seeds": 3,
    "rates": False,
    "minutes": 0.0,
    "workers": 1,
    "streams": 1,
    "only": "",
    "speedrun_tokens": 0,
    "speedrun_lr": 0.0,
    "weights": False,
    "device": "auto",
    "precision": "bf16",
    "save_every": 45.0,
    "least": 2.0,  # seconds that must be left for a cell to begin
    "whole": False,
    "spare": 0.0,
    "gpu": 0,
    "others": 0,
    "input": "",
    "part": "",
    "join": "",
    "tokenizer": "",
    "vocabulary": 16_384,
}
ACTIONS = ("corpus", "plan", "compile", "run", "resume", "again", "beside", "draw", "export")


def arguments(words: list[str]) -> tuple[str, dict[str, Any]]:
    """(what is to be done, values). Raises UserError with all problems."""
    if not words or words[0] not in ACTIONS:
        said = f" ({nearest(words[0], ACTIONS)})" if words else ""
        raise UserError(f"Say first what is to be done: {', '.join(ACTIONS)}{said}.")

    def chosen(values: dict[str, Any]) -> list[str]:
        from scripts.board.cells import BOARDS
        from scripts.board.plan import STAGES, rows_of

        problems = []
        values["stages"] = [s.strip() for s in values["stages"].split(",") if s.strip() not in ("", "all")] or list(STAGES)
        values["first"] = [s.strip() for s in values["first"].split(",") if s.strip()]
        unknown = [(key, s) for key in ("stages", "first") for s in values[key] if s not in STAGES]
        problems += [f"{key}: {nearest(s, STAGES)} (there is no {s!r})" for key, s in unknown]
        values["only"] = [name.strip() for name in values["only"].split(",") if name.strip()]
        if values["size"] not in BOARDS:
            problems.append(f"size is {values['size']!r}; {nearest(values['size'], BOARDS, known_as='choose one of')}")
        if values["precision"] not in ("bf16", "fp32"):
            problems.append(f"precision is {values['precision']!r}; choose bf16 or fp32.")
        if values["device"] not in ("auto", "cpu", "cuda"):
            problems.append(f"device is {values['device']!r}; choose auto, cpu or cuda.")
        if min(values["minutes"], values["spare"]) < 0 or values["save_every"] <= 0:
            problems.append("minutes and spare must be zero or more, and save_every above zero.")
        if "speedrun" in values["stages"] and len(values["stages"]) == 1 and not (values["speedrun_tokens"] and values["speedrun_lr"] > 0):
            problems.append("A speedrun needs speedrun_tokens and speedrun_lr above zero.")
        try:
            values["rows"] = rows_of(values["rows"])
        except UserError as error:
            problems += error.problems
        return problems

    return words[0], parse_arguments(words[1:], DEFAULTS, chosen)


def run(values: dict[str, Any]) -> int:
    """Runs what is pending, and what follows from its results, until nothing is left or time is up; 1 where a cell failed."""
    from scripts.board.queue import failed, make_plan, pending
    from scripts.board.work import run_all

    begin(values)
    plan = make_plan(values)
    cells, _ = pending(values, plan)
    print(f"{len(cells)} cells known so far are to be run on {values['device']}", flush=True)
    run_all(values)
    cells, _ = pending(values, plan)
    print(f"{len(cells)} cells are left of those known so far" if cells else "All cells known so far are finished.")
    if lost := failed(values):
        print(f"Failed: {', '.join(lost)}; {Path(values['out']) / 'attempts.jsonl'} says why, and the same command tries again.")
    return int(bool(lost))


def begin(values: dict[str, Any]) -> None:
    """Settles the device and the time that is up. Raises UserError."""
    import torch

    began = time.time()
    if values["device"] == "auto":
        values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if values["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device; use device=auto.")
    check_writable(Path(values["out"]))
    values["until"] = began + 60 * values["minutes"] if values["minutes"] else 0.0


def again(values: dict[str, Any]) -> int:
    """Runs finished cells, named by only=, once more into OUT/again, and compares; 1 where bits differ. Raises UserError."""
    from scripts.board.queue import chosen_cells, make_plan
    from scripts.board.results import every, read
    from scripts.board.work import work

    known = read(Path(values["out"]), Path(values["page"]))
    cells = chosen_cells(values, make_plan(values), known) if values["only"] else []
    missing = [cell.name for cell in cells if cell.name not in known or not known[cell.name].of(cell.settings)]
    if missing or not cells:
        raise UserError(f"only={','.join(missing)} is not finished; run it first." if missing else "Name finished cells with only=.")
    values["out"] = str(Path(values["out"]) / "again")
    begin(values)
    folder = Path(values["out"])
    for cell in cells:
        (folder / "cells" / f"{cell.name}.json").unlink(missing_ok=True)
    work(values | {"workers": 1}, values["gpu"], fixed=list(cells))
    done, status = {result.name: result.content for result in every(folder, folder)}, 0
    for cell in cells:
        if cell.name in done:
            first, second = known[cell.name].content, json.loads(json.dumps(finite(done[cell.name])))
            differ = [key for key in ("weights_sha256", "curve", "measured") if first.get(key) != second.get(key)]
            status = max(status, int(bool(differ)))
            print(
                f"{cell.name}: {'the same bits' if not differ else 'DIFFERENT: ' + ', '.join(differ)}, {second.get('stops')} stops this time"
            )
    return status


def show(values: dict[str, Any]) -> None:
    """Prints the models, their counts, and the cells by stage."""
    from scripts.board.architectures import ARCHITECTURES, WAITING, counts
    from scripts.board.cells import BOARDS
    from scripts.board.plan import STAGES
    from scripts.board.queue import make_plan
    from scripts.board.results import read

    board, results, plan = BOARDS[values["size"]], read(Path(values["out"]), Path(values["page"])), make_plan(values)
    print(f"{'row':24}{'parameters':>12}{'with embedding':>16}{'FLOPs/token':>13}{'layers':>8}{'MLP':>6}{'state at 1k':>13}{'at 128k':>15}")
    for row in values["rows"]:
        c = counts(row, values["size"], board.T, board.vocabulary)
        print(
            f"{row:24}{c['parameters']:>12,}{c['parameters_with_embedding']:>16,}{c['training_flops_per_token']:>13.3e}{c['n_layers']:>8}"
            f"{c['d_ff']:>6}{c['state_bytes_1k']:>13,}{c['state_bytes_128k']:>15,}"
        )
    for name, label in WAITING.items():
        print(f"{name:24}{label}: in the plan, no mixer yet; then a row, a 3:1 hybrid, and the one layer of a hybrid")
    cells = plan.cells(results, values["stages"])
    for stage in STAGES:
        of_stage = [cell for cell in cells if cell.stage == stage]
        done = sum(cell.name in results and results[cell.name].of(cell.settings) for cell in of_stage)
        tokens = sum(c.settings["steps"] * c.settings["rows"] * c.settings["T"] for c in of_stage if c.stage != "speed")
        if stage in values["stages"]:
            print(f"{stage:8} {done:>4} of {len(of_stage):>4} cells known so far, {tokens / 1e6:,.1f}M tokens in all")
    assert all(row in ARCHITECTURES for row in values["rows"])


def main(words: list[str]) -> int:
    """What the command line asks for; the exit status. Raises UserError."""
    action, values = arguments(words)
    if action == "corpus":
        from scripts.board import corpus

        return corpus.command(values)
    if action == "plan":
        show(values)
    elif action == "again":
        return again(values)
    elif action == "beside":
        from scripts.board.beside import beside

        begin(values)
        beside(values)
    elif action == "compile":
        from scripts.board.compiling import compile_all

        begin(values)
        compile_all(values)
    elif action == "draw":
        from scripts.board.draw import draw

        draw(values)
    elif action == "export":
        from scripts.board.export import export_cells

        export_cells(values)
    else:
        return run(values)
    return 0


if __name__ == "__main__":
    sys.exit(program(__doc__, main, interrupted="interrupted; the same command goes on where this one stopped"))
