"""A real server on a free loopback port, with a tokenizer trained here and a small model with random weights."""

import time

import httpx
import pytest
import torch

from local_server import serve
from plinth.inference.engine import Engine
from plinth.inference.text import TextEngine
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.serving.app import create_app
from plinth.serving.listening import Connection
from plinth.tokenizer.train import train_tokenizer

TEXTS = [
    "shutil.copyfile(src, dst) copies the contents of the file named src to a file named dst.",
    "Größe, naïve café, 東京タワー, 🙂🙃 and other text that needs more than one byte a character. ",
    "def main(argv):\n    return 0\n\n\nclass Path:\n    def exists(self):\n        return True\n",
] * 20


def random_model(vocab_size: int, max_seq_len: int = 128) -> Transformer:
    """A decoder whose weights are all drawn, so that its answers depend on the whole prompt."""
    config = DecoderConfig(
        vocab_size=vocab_size, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=64,
        max_seq_len=max_seq_len,
    )  # fmt: skip
    model = Transformer(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 1.2 * parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0)
    return model.eval()


@pytest.fixture(scope="session")
def make_text_engine():
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)

    def make(max_batch: int = 8, max_seq_len: int = 128, eos: bool = True) -> TextEngine:
        model = random_model(tokenizer.vocab_size, max_seq_len)
        eos_ids = (tokenizer.end_of_text_id, tokenizer.end_id) if eos else ()
        return TextEngine(Engine(model, max_batch=max_batch, eos_ids=eos_ids), tokenizer)

    return make


@pytest.fixture(scope="session")
def start():
    """Start servers of one's own: `with start(text_engine, limits=Limits(max_queue=1)) as url`."""

    def start(text_engine, connection=Connection, **options):
        return serve(create_app(text_engine, "tiny", **options), connection)

    return start


@pytest.fixture(scope="session")
def base_url(make_text_engine, start):
    with start(make_text_engine()) as url:
        yield url


@pytest.fixture(scope="session")
def post(base_url):
    """Post JSON to the shared server and return the answer."""
    return lambda path, **body: httpx.post(f"{base_url}{path}", json={"model": "tiny", **body}, timeout=120)


@pytest.fixture(scope="session")
def client(base_url):
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    return openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture
def wait_until():
    """Poll a condition, as one must where another thread makes it true; fail after 30 s."""

    def wait(condition, what: str):
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, f"still not: {what}"
            time.sleep(0.01)

    return wait
