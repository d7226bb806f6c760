"""The pictures of docs/board.md: the board in Chromium, with a model that fits a card and one that does not.

python docs/board_pictures.py      docs/board-plan*.png, in some minutes

Needs Chromium (apt-get install chromium) and, for the Chinese ones, a Chinese font (fonts-wqy-zenhei). A picture of 200 kB or
more is refused.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests" / "board"))
from browser import Browser, browser, served  # noqa: E402

MOST_BYTES = 200_000
#: the numbers of Qwen3-8B's published config.json
QWEN3_8B = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
SMALL = {"model.source": "minimind2", "memory.gpu": "RTX 4090", "batch.effective": "16", "data.max_length": "2048"}  # fmt: skip
LARGE = SMALL | {"model.source": "./Qwen3-8B", "model.method": "lora", "data.max_length": "4096"}
PLANNED = (
    "document.querySelector('.stage')?.textContent === '' && !!document.querySelector('.verdict')"
)


def show(tab: Browser, settings: dict[str, str], *, language: str = "en") -> None:
    tab.run(f"localStorage.setItem('fitune-plan', {json.dumps(json.dumps(settings))})")
    tab.run(f"fitune.language = '{language}'; fitune.show()")
    tab.wait(PLANNED, 600)


def draw(tab: Browser, name: str, *, width: int, height: int, dark: bool = False) -> None:
    """Raises SystemExit where the picture is too large for a page."""
    tab.size(width, height, dark=dark)
    tab.run("scrollTo(0, 0); new Promise((done) => setTimeout(done, 300))")
    path = DOCS / f"board-{name}.png"
    tab.picture(path)
    size = path.stat().st_size
    if size >= MOST_BYTES:
        raise SystemExit(
            f"{path} has {size:,} bytes, {MOST_BYTES:,} or more: draw less of the page"
        )
    print(f"{path}: {size:,} bytes")


def main() -> None:
    with TemporaryDirectory() as directory:
        (Path(directory) / "Qwen3-8B").mkdir()
        (Path(directory) / "Qwen3-8B" / "config.json").write_text(json.dumps(QWEN3_8B))
        with served(Path(directory)) as url, browser() as tab:
            tab.size(1280, 1020)
            tab.open(url)
            tab.wait("!!document.querySelector('.controls input')")
            show(tab, SMALL)
            draw(tab, "plan", width=1280, height=1020)
            draw(tab, "plan-phone", width=390, height=1000)
            show(tab, LARGE)
            draw(tab, "plan-dark", width=1280, height=1020, dark=True)
            show(tab, LARGE | {"model.method": "full", "data.max_length": "2048"}, language="zh")
            draw(tab, "plan-zh", width=1280, height=880)


if __name__ == "__main__":
    main()
