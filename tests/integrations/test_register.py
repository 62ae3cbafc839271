"""Registration with transformers, each case in a fresh process: what is imported when is the point."""

import subprocess
import sys

import pytest

REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING
quantizer, config = AUTO_QUANTIZER_MAPPING["paroquant"], AUTO_QUANTIZATION_CONFIG_MAPPING["paroquant"]
print(quantizer.__name__, config.__name__)
"""

FOREIGN = """
from transformers.quantizers.auto import register_quantizer, register_quantization_config
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

@register_quantization_config("paroquant")
class ForeignConfig(QuantizationConfigMixin): pass

@register_quantizer("paroquant")
class ForeignQuantizer(HfQuantizer): pass
"""


def run(code: str, *options: str) -> str:
    command = [sys.executable, "-W", "error::UserWarning", *options, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(
    "imports",
    [
        "import parofx; from transformers import LlamaForCausalLM",
        "import transformers; transformers.AutoModelForCausalLM; import parofx",
        "import parofx.integrations.transformers",
    ],
)
def test_either_import_order_registers(imports):
    assert run(imports + "\n" + REGISTERED) == "ParoHfQuantizer ParoQuantizationConfig"


def test_parofx_alone_imports_neither_transformers_nor_triton():
    code = "import parofx, sys; print([name for name in ('transformers', 'triton') if name in sys.modules])"
    assert run(code) == "[]"


def test_a_failed_import_stays_the_failure_it_was_and_one_finder_waits_for_the_next():
    code = """
import sys, types, parofx
from parofx import integrations

def count():
    return sum(type(finder).__name__ == "_PostImportFinder" for finder in sys.meta_path)

sys.modules["transformers"] = package = types.ModuleType("transformers")
package.__path__ = []
try:
    import transformers.quantizers.auto
except ModuleNotFoundError as error:
    print(error)
del sys.modules["transformers"]
integrations.register()
print(count())
import transformers.quantizers.auto as auto
integrations.register()
print(count(), type(auto.__spec__.loader).__name__, type(auto.__loader__).__name__)
"""
    assert run(code + REGISTERED).splitlines() == [
        "No module named 'transformers.quantizers'",
        "1",
        "0 SourceFileLoader SourceFileLoader",
        "ParoHfQuantizer ParoQuantizationConfig",
    ]


def test_an_unusable_transformers_is_a_warning_not_an_error():
    code = """
import sys, types, warnings, parofx
sys.modules["parofx.integrations.transformers"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import transformers.quantizers.auto
print([str(one.message)[:47] for one in caught if "parofx" in str(one.message)])
"""
    assert run(code) == "['parofx could not register with transformers, PA']"


def test_another_package_keeps_the_name_until_forced():
    code = f"""
import json, pathlib, tempfile, warnings
{FOREIGN}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import parofx, parofx.errors
print([one.category.__name__ for one in caught], str(caught[0].message))
{REGISTERED}
folder = pathlib.Path(tempfile.mkdtemp())
config = {{"architectures": ["LlamaForCausalLM"], "quantization_config": {{"quant_method": "paroquant"}}}}
(folder / "config.json").write_text(json.dumps(config))
warnings.simplefilter("ignore")
try:
    parofx.load_pretrained(folder)
except parofx.errors.CheckpointError as error:
    print(error)
from parofx.integrations.transformers import register
register(force=True)
{REGISTERED}
"""
    warned, before, refused, after = run(code).splitlines()
    assert "['UserWarning'] transformers loads 'paroquant' checkpoints with __main__.ForeignQuantizer" in warned
    assert "register(force=True)" in warned
    assert "another package loads 'paroquant' checkpoints" in refused
    assert "register(force=True)" in refused
    assert (before, after) == ("ForeignQuantizer ForeignConfig", "ParoHfQuantizer ParoQuantizationConfig")
