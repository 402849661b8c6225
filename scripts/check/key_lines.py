"""Takes the key line of each method of docs/methods out of a copy of the code; the method's own tests must then fail.

    python -m scripts.check.key_lines                     all of them, two at a time
    python -m scripts.check.key_lines only=mup,aaren      these
    more keys: as of scripts.check.faults (list, jobs, out, again)

A line taken out is a fault as those of scripts/check/faults.py are. Exit status: 0 every test failed without its line, 1 one did not.
"""

from __future__ import annotations

import sys

from scripts.check.faults import Fault, main
from training.config.arguments import program

KEY_LINES = {
    "mup rate": Fault(
        "hidden matrices take the whole learning rate at every width",
        "tag(parameter, rate=1 / m * roles(parameter)",
        "tag(parameter, rate=roles(parameter)",
        "tests/models/test_mup.py",
    ),
    "mup head": Fault(
        "the head starts as large at every width",
        "divides.mul_(0.0 if config.zero_head and not tied else 1 / m)",
        "divides.mul_(0.0 if config.zero_head and not tied else 1.0)",
        "tests/models/test_mup.py",
    ),
    "ffn start": Fault(
        "the dense helper starts elsewhere than at the product",
        "self.dense.weight.copy_(self.merged())",
        "self.dense.weight.copy_(whole)",
        "tests/models/test_structured.py",
    ),
    "ffn size": Fault(
        "maps begin as large as their factors make them",
        "gain = (whole.norm() / self.merged().norm().cpu()).sqrt().item()",
        "gain = 1.0",
        "tests/models/test_structured.py",
    ),
    "ffn fading": Fault(
        "the helper's share does not fall",
        "self.mixed.fill_(0.5 + 0.5 * math.cos(math.pi * share / self.config.guide) if self.guided else 0.0)",
        "self.mixed.fill_(1.0)",
        "tests/models/test_structured.py",
    ),
    "ffn rates": Fault(
        "factors have the rate of their map",
        "tag(factor.weight, rate=(inputs / fan_in) ** config.rate_power)",
        "tag(factor.weight, rate=1.0)",
        "tests/models/test_structured.py",
    ),
    "ffn merging": Fault(
        "an export multiplies the factors out without the shuffle",
        "y = (_dealt(h, self.blocks) if self.shuffled else h) @ _matrix(self.left).T",
        "y = h @ _matrix(self.left).T",
        "tests/models/test_structured.py",
    ),
    "depth core": Fault(
        "the core does not read its own last output",
        "walk.x = linear(torch.cat([s_BTD, e_BTD], -1), self.adapter).to(stream)",
        "walk.x = linear(torch.cat([e_BTD, e_BTD], -1), self.adapter).to(stream)",
        "tests/models/test_depth.py",
    ),
    "depth halting": Fault(
        "tokens that have halted go on",
        "given, x_BTD = given + weight, torch.where(running[..., None], y_BTD, x_BTD)",
        "given, x_BTD = given + weight, y_BTD",
        "tests/models/test_depth.py",
    ),
    "paths": Fault(
        "a path is not walked",
        "model.blocks = nn.ModuleList(layers[i] for i in path)",
        "model.blocks = layers",
        "tests/evals/test_layer_paths.py",
    ),
    "lti frequencies": Fault(
        "S4D has no frequencies",
        'im = {"lin": math.pi * n,',
        'im = {"lin": 0 * n,',
        "tests/methods/test_lti.py",
    ),
    "lti step": Fault(
        "input sampled half as often is read at the old step",
        "return torch.exp(self.log_dt.double()) * self.config.dt_scale",
        "return torch.exp(self.log_dt.double())",
        "tests/methods/test_lti.py",
    ),
    "aaren": Fault(
        "the running sum stays what it was, so that it forgets",
        "log_sum_BH, average_BHK = scores[:, :, -1].logsumexp(-1), o_BHQK[:, :, -1]",
        "log_sum_BH, average_BHK = log_sum_BH, o_BHQK[:, :, -1]",
        "tests/methods/test_aaren.py",
    ),
    "jrt sums": Fault(
        "a prompt is not summed beforehand",
        "for sees, keys, values in ((before, k, v), (twice, k_e, v_e)):",
        "for sees, keys, values in ((before, k, v),):",
        "tests/methods/test_jrt.py",
    ),
    "jrt labels": Fault(
        "masked tokens of a prompt are not asked for",
        "labels = np.where(masked, inputs, np.where(place < self.prompt - 1, IGNORE, labels))",
        "labels = np.where(place < self.prompt - 1, IGNORE, labels)",
        "tests/methods/test_jrt.py",
    ),
    "plstm rotations": Fault(
        "transitions are diagonal",
        "return (rotation(behind, self.J) * diagonal[..., None, :]) @ rotation(ahead, self.J)",
        "return torch.diag_embed(diagonal)",
        "tests/methods/test_plstm.py",
    ),
    "plstm sign": Fault(
        "eigenvalues lie between 0 and 1",
        "diagonal = torch.tanh(5 * diagonal)",
        "diagonal = torch.sigmoid(5 * diagonal)",
        "tests/methods/test_plstm.py",
    ),
    "miras decay": Fault(
        "gradients are taken at the memory before its decay",
        "written = since = [torch.exp(decay) * w for w in written]",
        "written = [torch.exp(decay) * w for w in written]",
        "tests/methods/test_miras.py",
    ),
    "miras huber": Fault(
        "Huber's loss has no limit",
        "slope = torch.maximum(torch.minimum(error, limit), -limit)",
        "slope = error",
        "tests/methods/test_miras.py",
    ),
    "miras norm": Fault(
        "the q-norm of a memory is a sum over its weights, so that it holds them all far below one",
        "return [w / (1 + w.abs().pow(q).mean((-2, -1), keepdim=True)) ** ((q - 2) / q) for w in written]",
        "return [w / (1 + w.abs().pow(q).sum((-2, -1), keepdim=True)) ** ((q - 2) / q) for w in written]",
        "tests/methods/test_miras.py",
    ),
    "miras step": Fault(
        "an l_p step carries further than the error",
        "slope = error * ((error.square() + SMOOTH) ** (p / 2 - 1)).clamp(max=1.0) if",
        "slope = error * ((error.square() + SMOOTH) ** (p / 2 - 1)) if",
        "tests/methods/test_miras.py",
    ),
    "conversion": Fault(
        "a new mixer does not begin from the attention's weights",
        "x.copy_(v), B.copy_(k), C.copy_(q)",
        "pass",
        "tests/models/test_convert.py",
    ),
    "distillation": Fault(
        "the divergence is the other way round",
        "return temperature**2 * (p.exp() * (p - q)).sum()",
        "return temperature**2 * (q.exp() * (q - p)).sum()",
        "tests/models/test_convert.py tests/training/test_distill.py",
    ),
    "noise": Fault(
        "no noise is added",
        "gradient.add_(drawn * size if scale is None else drawn * (size * scale))",
        "gradient.add_(drawn * 0)",
        "tests/training/test_grad_noise.py",
    ),
    "repetition": Fault(
        "4-grams written before are counted as new ones",
        "return 1 - distinct(ids_L, n)",
        "return distinct(ids_L, n)",
        "tests/evals/test_repetition.py",
    ),
    "dynamics": Fault(
        "a state is rebuilt without Lambda",
        "S = r.advanced(S, t) + r.u[:, t]",
        "S = S + r.u[:, t]",
        "tests/evals/test_dynamics.py",
    ),
    "dynamics walk": Fault(
        "a walk writes what a step makes of its own state once more",
        "twice[name] - once[name] + written[name]",
        "twice[name] - once[name] + once[name]",
        "tests/evals/test_dynamics.py",
    ),
    "dynamics averages": Fault(
        "an average forgets nothing",
        "(sums[:, :-1] - sums[:, 1:]).exp()",
        "(sums[:, :-1] - sums[:, :-1]).exp()",
        "tests/evals/test_dynamics.py",
    ),
    "conversion sizes": Fault(
        "copied mixers begin with outputs of the size of values though others were measured",
        "if measured_I is None:",
        "if True:",
        "tests/models/test_convert.py",
    ),
}


if __name__ == "__main__":
    sys.exit(program(__doc__, lambda words: main(words, KEY_LINES, "runs/key_lines.json")))
