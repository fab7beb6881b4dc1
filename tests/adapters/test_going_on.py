"""Training goes on with an adapter that is there: what is asked for is what it has, or it is refused."""

import pytest

from halfbyte import InputError, run
from halfbyte.adapters import attached
from halfbyte.outputs import save
from halfbyte.steps import Adapt
from miniatures import folder

HAD = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"], "rank_pattern": {"q_proj": 2}}
OTHER = [
    ({"r": 64}, "r 64"),
    ({"r": 4}, "r 4"),  # which only some layers have
    ({"lora_alpha": 64}, "lora_alpha 64"),
    ({"use_dora": True}, "use_dora True"),
    ({"use_rslora": True}, "use_rslora True"),
    ({"lora_dropout": 0.1}, "lora_dropout 0.1"),
    ({"rank_pattern": {"q_proj": 8}}, "r 8"),
    ({"rank_pattern": {"k_proj": 2}}, "'k_proj'"),
    ({"alpha_pattern": {"q_proj": 9}}, "lora_alpha 9"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save lm_head"),
    ({"target_modules": ["q_proj"]}, "target_modules"),
    ({"use_qalora": True}, "use_qalora True"),
    ({"qalora_group_size": 16}, "qalora_group_size 16"),
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    base = folder(tmp_path_factory.mktemp("going-on") / "base", "llama-untied")
    made = run.load(base)
    Adapt(modules_to_save=["model.norm"], **HAD)(made)
    return base, save(made, base.parent / "adapter")


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("asked", "says"), OTHER)
def test_what_the_adapter_has_not_is_refused(paths, asked, says, named):
    base, adapter = paths
    begun = named and "init_lora_weights" in asked  # which is found before the folder is read
    with pytest.raises(InputError, match="has begun already" if begun else f"^{says}.*leave it out"):
        Adapt(**asked, **({"path": str(adapter)} if named else {}))(run.load(base if named else adapter))


DEFAULTS = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False}  # the command's


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        DEFAULTS,
        {**DEFAULTS, **HAD},
        {"r": 4, "rank_pattern": {r"layers\.\d\.self_attn\.q_proj": 2}},  # the same of all layers
        {"rank_pattern": {"q_proj": 2}},
        {"init_lora_weights": True, "rank_pattern": None, "modules_to_save": ["model.norm"]},
    ],
)
def test_what_it_has_may_be_said_again_and_defaults_say_nothing(paths, asked, named):
    base, adapter = paths
    made = run.load(base if named else adapter)
    Adapt(**asked, **({"path": str(adapter)} if named else {}))(made)
    assert {n.rpartition(".")[2]: a.r for n, a in attached(made.model).items()} == {"q_proj": 2, "lm_head": 4}


def test_one_adapter_goes_on_not_two(paths):
    _, adapter = paths
    with pytest.raises(InputError, match="has an adapter already"):
        Adapt(path=str(adapter))(run.load(adapter))
