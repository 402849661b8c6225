"""S4D, S5 and LSSL: how well a state holds the past (the delay task), input sampled half as often, and their cost.

python -m scripts.studies.methods.lti            # a minute on one core; docs/results/methods/lti.json
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models import mixers
from scripts.studies.methods.common import arguments, cost, write

KINDS: dict[str, dict[str, Any]] = {
    "s4d": {"kind": "s4d"},
    "s5": {"kind": "s5"},
    "lssl": {"kind": "lssl", "d_state": 32, "discretization": "bilinear"},
}


def smooth(T: int, period: float, draw: torch.Generator) -> Tensor:
    """(T,) fp64, of variance one: a sum of waves of random phase, none shorter than `period` tokens."""
    waves = torch.rand(32, 2, generator=draw, dtype=torch.float64)
    y = torch.cos(2 * math.pi * (torch.arange(T)[:, None] / period * waves[:, 0] + waves[:, 1])).sum(1)
    return y / 4


def states_of(kind: str, N: int, u_T: Tensor, dt: float, **values: Any) -> Tensor:
    """(T, N) the states of one channel with a step of `dt`, as they are initialised."""
    torch.manual_seed(0)
    mixer = mixers.build({"type": "lti", "kind": kind, "d_state": N, "discretization": "bilinear", **values}, 1, 0)
    mixer.init_weights(0.1, 0)
    mixer.double()
    states, state = [], mixer.init_state(1, dtype=torch.float64)
    with torch.no_grad():
        mixer.log_dt.fill_(math.log(dt))
        for t in range(len(u_T)):
            state = mixer(u_T[None, t : t + 1, None], state)[1]
            states.append(state.x_BDN.flatten())
    return torch.stack(states)


def delay_error(kind: str, *, N: int, delay: int, width: float = 4.0, **values: Any) -> float:
    """How far, relative to its size, the best linear reading of the state is from the input `delay` tokens ago, blurred over `width` tokens.

    What a reading C gives for white noise is told by its answer to one impulse, so nothing has to be drawn: it is the distance of the blurred
    delay from the span of what the states do after an impulse.
    """
    T = 4 * delay
    impulse = torch.zeros(T, dtype=torch.float64)
    impulse[0] = 1
    basis_TN = states_of(kind, N, impulse, (0.5 if kind == "s4d" else 1.0) / delay, **values)  # a state looks back about 1 / dt
    wanted_T = torch.exp(-0.5 * ((torch.arange(T) - delay) / width).double().square())
    Q, R = torch.linalg.qr(basis_TN / basis_TN.norm(dim=0).clamp(min=1e-30))
    Q = Q[:, R.diagonal().abs() > 1e-9]
    return float((wanted_T - Q @ (Q.T @ wanted_T)).norm() / wanted_T.norm())


def trained_error(mapping: dict[str, Any], seed: int, *, steps: int = 300, delay: int = 40, T: int = 160) -> list[float]:
    """The same relative error after training all of a layer without its GELU and GLU on noise of variance one, at eleven times in training."""
    torch.manual_seed(seed)
    mixer: Any = mixers.build({"type": "lti", "dt_min": 0.5 / delay, "dt_max": 0.6 / delay, **mapping}, 4, 0)
    mixer.init_weights(0.1, 0)
    optimizer, errors = torch.optim.Adam([p for n, p in mixer.named_parameters() if "out_proj" not in n], lr=1e-2), []
    blur = torch.exp(-0.5 * ((torch.arange(2 * delay) - delay) / 4.0).square()).flip(0)[None, None].expand(4, 1, -1)
    for step in range(steps + 1):
        u = torch.randn(16, T, 4)
        wanted = F.conv1d(F.pad(u.mT, (2 * delay - 1, 0)), blur, groups=4).mT / 3.0
        error = (mixer.read(u)[0] - wanted)[:, 2 * delay :].square().mean() / wanted[:, 2 * delay :].square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        if step % (steps // 10) == 0:
            errors.append(round(float(error.detach().sqrt()), 4))
    return errors


def main() -> None:
    given = arguments(__doc__, "lti", ("delay", "trained", "cost"))
    arms: dict[str, dict[str, Any]] = {"s4d": {}, "s4d-inv": {"init": "inv"}, "s4d-real": {"init": "real"}, "s5": {}, "lssl": {}}
    if "delay" in given.wanted:
        delays = {
            f"{name} N={N}": round(delay_error(name.split("-")[0], N=N, delay=40, **more), 4)
            for name, more in arms.items()
            for N in (8, 16, 32, 64)
        }
        write(given.out, delay={"what": "relative error of the input 40 tokens ago, blurred over 4; nothing is drawn", "errors": delays})
        print(delays)
    if "trained" in given.wanted:
        curves = {
            name: [trained_error(mapping, seed) for seed in range(given.seeds)]
            for name, mapping in {**KINDS, "s4d-real": {"kind": "s4d", "init": "real"}}.items()
        }
        write(given.out, trained={"what": "relative error in training, a list a seed, eleven times from step 0 to 300", "errors": curves})
        print({name: [curve[-1] for curve in seeds] for name, seeds in curves.items()})
    if "cost" in given.wanted:
        costs = {name: cost({"type": "lti", **mapping}) for name, mapping in KINDS.items()}
        write(given.out, cost=costs)
        print({name: (c["step_ratio"], c["token_ratio"]) for name, c in costs.items()})


if __name__ == "__main__":
    main()
