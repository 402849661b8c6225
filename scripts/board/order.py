"""The order of stages 0 and 1 of the board, the rows that it names, and how many seeds they have (docs/board/protocol.md says why)."""

from __future__ import annotations

from scripts.board.architectures import ARCHITECTURES

SEEDS, DECISIVE_SEEDS = 3, 5
# Rows from whose comparison the page answers; they get DECISIVE_SEEDS seeds.
DECISIVE = ("gdn_hybrid", "gdn_hybrid_muon", "mamba2_hybrid", *(name for name, row in ARCHITECTURES.items() if row.instead))

# Of these rows the stage's cells, one group after the other, each from its rates to its last seed before the next is begun;
# groups are small, so that what time breaks off is few rows and not the seeds of all. `twenty`, `ten` and `five`: seeds of stage 0 and of stage 1
# up to so many, of decisive rows. `speed` and `probe`: those rows' timing, and their probes with seed 0. Rows that are not named come last.
DECISIVE0 = ("gdn_hybrid", "gdn_hybrid_paragru", "gdn_hybrid_dense_lstm")
PLAIN = ("mamba2", "transformer", "gdn", "paragru")
RECURRENT = ("paralstm", "deltaproduct", "dense_lstm")
TEN = (*DECISIVE0, *PLAIN, *RECURRENT)
MUON = tuple(f"{row}_muon" for row in DECISIVE0)
MUON_TIME_SEEDS = 7  # of the hybrid under Muon at equal time
MORE_SEEDS = {"twenty": ("stage0", 5, 20), "ten": ("stage0", SEEDS, 10), "five": ("stage1", SEEDS, DECISIVE_SEEDS)}
ONE_BY_ONE = ("paragru", "paralstm", "gdn", "gdn_hybrid_dense_lstm", "deltaproduct", "paragru_hybrid", "dense_lstm")
ORDER = (
    ("stage0", DECISIVE0),
    ("stage0", PLAIN),
    ("stage0", RECURRENT),
    ("stage0", ("transformer_muon", "gdn_muon")),
    ("stage0", ("mamba2_pass", "gdn_pass")),
    ("speed", DECISIVE0),
    ("stage1", DECISIVE0[:2]),
    ("time0", DECISIVE0),
    ("twenty", DECISIVE0[:1]),
    ("stage1", ("mamba2", "transformer")),
    ("stage0", MUON),
    ("ten", MUON),
    ("speed", (*MUON, *PLAIN, *RECURRENT, "transformer_muon")),
    ("time0", MUON),
    *(("stage1", (row,)) for row in ONE_BY_ONE),
    ("probe", (*PLAIN, *RECURRENT, *DECISIVE0)),
    ("stage0", ("m2rnn", "slstm")),
    ("five", DECISIVE0[:2]),
    ("stage1", ("transformer_muon",)),
    ("speed", ("m2rnn", "slstm")),
    ("probe", ("m2rnn", "slstm")),
    ("twenty", DECISIVE0[1:]),
    ("stage0", ("gdn_hybrid_m2rnn", "mamba2_hybrid")),
    ("stage0", ("mamba2_hybrid_paragru", "mamba2_hybrid_dense_lstm", "mamba2_hybrid_m2rnn")),
    ("stage0", ("paragru_hybrid", "dense_lstm_hybrid", "m2rnn_hybrid")),
    ("stage0", ("paralstm_hybrid", "slstm_hybrid", "deltaproduct_hybrid")),
    ("stage0", ("mamba2_muon", "paragru_muon", "paragru_pass", "gdn_hybrid_m2rnn_muon")),
    ("time1", DECISIVE0),
    ("stage1", MUON),
    ("stage1", ("gdn_muon", "mamba2_pass", "gdn_pass", "gdn_hybrid_m2rnn", "m2rnn", "slstm", "mamba2_hybrid")),
)
NO_STAGE0 = ("paragru_hybrid",)  # rows whose stage 1 begins with the grid's two upper rates, as they have no stage 0 (protocol.md)
# The rows that go on to 350M tokens, in the order of their cells, and the seeds of each: protocol.md says by which rule, written before the first of them.
LEADERS = ("paragru_hybrid", "transformer", "gdn_hybrid", "gdn")
LEADERS_SEEDS = (1, 0, 2)
LEADING_ROWS = 8  # with SEEDS seeds that a stage needs to lead the page
FINAL = "stage0"  # the stage whose table is whole, by the time that can be had on a device (protocol.md)
MOST_SEEDS = max(last for _, _, last in MORE_SEEDS.values())
READ0 = 1  # the seed whose cell of stages 0 and 1 and of the full pass has more read off it than the held-out loss; the first one that chose no rate
