"""Servers as they are: one that fails now and then, one that reads another prompt, and vLLM's own."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlhf.config import Rollout as RolloutConfig
from rlhf.config import Server
from rlhf.rollout.engine import Sampling, build_engine
from rlhf.rollout.openai_server import OpenAIServer, request_seed
from rlhf.sampling import Question, from_engine

QUESTION = Question(id="p0", text="1 + 1?", token_ids=(5, 6, 7))


class Local(ThreadingHTTPServer):
    """Answers like a server, except where `faults` says otherwise: a status, or a raw body, for each request to come."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.requests, self.headers = [], [], []
        self.prompt_tokens, self.choice = 3, {"text": "\\boxed{2}", "finish_reason": "stop"}
        self.models = ["tiny"]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.headers.append(dict(self.headers))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, int):
            self.answer({"error": "no \x1b[2J"}, fault)
        elif fault is not None:
            self.answer(fault)
        else:
            usage = {"prompt_tokens": self.server.prompt_tokens, "completion_tokens": 4}
            self.answer({"choices": [self.server.choice], "usage": usage})

    def answer(self, body, status=200):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args):
        pass


@pytest.fixture
def local():
    server = Local()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def client(url, waits=None, **changes):
    sampling = {"samples_per_prompt": 2, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 16}
    arguments = {"system_prompt": None, "prompt_text": None, "decode": None, "stop_token_id": 2}
    for given in (sampling, arguments):
        given |= {k: changes.pop(k) for k in list(changes) if k in given}
    wait = (lambda seconds: waits.append(seconds)) if waits is not None else lambda seconds: None
    return OpenAIServer(Server(url=url, **changes), Sampling(**sampling), **arguments, wait=wait)


def test_a_request_carries_the_tokens_the_sampling_and_a_seed_of_its_own(local):
    engine = client(local.url)
    ((first, second),) = engine.generate([QUESTION], 3)
    assert (first.text, first.num_tokens, first.finish_reason, first.confidence) == ("\\boxed{2}", 4, "stop", None)
    assert first == second
    asked = sorted(local.requests, key=lambda r: r["seed"] != request_seed(3, "p0", 0))
    assert asked[0]["prompt"] == [5, 6, 7]
    assert (asked[0]["temperature"], asked[0]["top_p"], asked[0]["max_tokens"], asked[0]["n"]) == (0.7, 0.9, 16, 1)
    assert asked[0]["stop_token_ids"] == [2]
    assert [r["seed"] for r in asked] == [request_seed(3, "p0", 0), request_seed(3, "p0", 1)]
    assert len({request_seed(s, i, n) for s in range(3) for i in ("a", "b") for n in range(50)}) == 300


@pytest.mark.parametrize("fault", [503, 429, 500])
def test_a_fault_that_passes_is_tried_again_with_growing_pauses(local, fault):
    waits = []
    engine = client(local.url, waits, samples_per_prompt=1)
    local.faults = [fault, fault, fault]
    assert engine.generate([QUESTION], 0)[0][0].text == "\\boxed{2}"
    assert waits == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([400], r"gave no answer to POST completions \(HTTP 400: .*no .*"),
        ([503] * 5, r"HTTP 503"),
        ([b"<html>"], "not a JSON object"),
        ([b"[]"], "not a JSON object"),
        ([{"choices": []}], "something else than a completion"),
        ([{"choices": [{"text": 7}]}], "something else than a completion"),
        ([{"choices": [{"text": "x"}], "usage": {}}], "something else than a completion"),
    ],
)
def test_a_fault_that_stays_is_a_sentence_without_control_characters(local, faults, message):
    engine = client(local.url, samples_per_prompt=1)
    local.faults = faults
    with pytest.raises(ValueError, match=message) as error:
        engine.generate([QUESTION], 0)
    assert "\x1b" not in str(error.value)


def test_a_server_that_is_not_there_says_what_to_do():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ValueError, match="ConnectError.*start the server, or correct server.url"):
        client(url)


@pytest.mark.parametrize(
    ("prompts", "counted", "message"),
    [
        ("tokens", 4, "adds a beginning-of-sequence token"),
        ("text", 4, "adds a beginning-of-sequence token"),
        ("messages", 30, "its chat template is another one"),
        ("text", 2, "its tokenizer is another one"),
    ],
)
def test_a_server_that_reads_another_prompt_than_training_wrote_is_refused(local, prompts, counted, message):
    local.prompt_tokens = counted
    local.choice = {"text": "x", "message": {"content": "x"}}
    engine = client(local.url, prompts=prompts, prompt_text=lambda question: f"<user>{question}")
    with pytest.raises(ValueError, match=f"as {counted} tokens and training would write 3: .*{message}"):
        engine.generate([QUESTION], 0)


def test_messages_need_no_tokenizer_and_carry_the_system_prompt(local):
    local.choice = {
        "message": {"content": None},
        "finish_reason": "length",
        "logprobs": {"content": [{"logprob": 0.0}]},
    }
    engine = client(local.url, prompts="messages", system_prompt="Be brief.", samples_per_prompt=1)
    ((sample,),) = engine.generate([Question(id="a", text="1 + 1?", token_ids=None)], 0)
    assert (sample.text, sample.finish_reason, sample.confidence) == ("", "length", 1.0)
    assert local.requests[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
    ]


def test_the_model_is_the_one_the_server_has_and_another_name_is_refused(local):
    with pytest.raises(ValueError, match="server.name is 'large' and .* lists tiny"):
        client(local.url, name="large")
    local.models = ["a", "b"]
    with pytest.raises(ValueError, match="lists the models a, b; set server.name to one of them"):
        client(local.url)


def test_the_key_is_read_from_the_environment_and_only_sent(local, monkeypatch):
    with pytest.raises(ValueError, match="names SCRATCHPAD_TEST_KEY, which is not set"):
        client(local.url, key_variable="SCRATCHPAD_TEST_KEY")
    monkeypatch.setenv("SCRATCHPAD_TEST_KEY", "k-1")
    client(local.url, key_variable="SCRATCHPAD_TEST_KEY").generate([QUESTION], 0)
    assert local.headers[0]["Authorization"] == "Bearer k-1"


# -------------------------------------------------------------------------------------------------------------------- vLLM itself


@pytest.fixture(scope="module")
def vllm_url(model_folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_folder, "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "200", "--enforce-eager",
        "--generation-config", "vllm",
    ]  # fmt: skip
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
    }
    running = subprocess.Popen(
        command,
        env={**os.environ, **settings},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        for _ in range(600):
            assert running.poll() is None, running.stderr.read().decode()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.3)
        else:
            pytest.fail("vLLM's server did not start in three minutes")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(running.pid, signal.SIGTERM)
        running.wait(30)


@pytest.fixture(scope="module")
def questions(renderer, demonstrations):
    return [
        Question(id=d.id, text=d.question, token_ids=tuple(renderer.prompt_ids(d.question))) for d in demonstrations[:3]
    ]


def vllm(url, renderer, **changes):
    arguments = {"samples_per_prompt": 1, "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 12, "prompt_text": renderer.prompt_text,
                 "decode": renderer.decode, "stop_token_id": renderer.stop_token_id}  # fmt: skip
    return client(url, **(arguments | changes))


@pytest.mark.slow
def test_vllms_server_decodes_greedily_what_transformers_does_whatever_form_the_prompt_has(
    vllm_url, renderer, questions, model_folder
):
    config = RolloutConfig(
        engine="transformers", samples_per_prompt=1, max_prompt_tokens=80, max_new_tokens=12, dtype="float32"
    )
    engine = build_engine(config, model_folder, stop_token_id=renderer.stop_token_id, decode=renderer.decode)
    generate = from_engine(engine, Sampling(samples_per_prompt=1, temperature=0.0, max_new_tokens=12))
    expected = [samples[0] for samples in generate(questions, 0)]
    for prompts in ("tokens", "text", "messages"):
        served = [samples[0] for samples in vllm(vllm_url, renderer, prompts=prompts).generate(questions, 0)]
        assert [s.num_tokens for s in served] == [e.num_tokens for e in expected], prompts
        assert [s.finish_reason for s in served] == [e.finish_reason for e in expected], prompts
        assert [s.text for s in served] == [e.text for e in expected] or prompts != "tokens"
        assert [s.confidence for s in served] == pytest.approx([e.confidence for e in expected], rel=1e-3), prompts


@pytest.mark.slow
def test_vllms_server_draws_the_same_samples_for_the_same_seed_in_any_order(vllm_url, renderer, questions):
    sampled = {"temperature": 1.0, "samples_per_prompt": 3}
    first = vllm(vllm_url, renderer, **sampled, concurrency=8).generate(questions, 5)
    second = vllm(vllm_url, renderer, **sampled, concurrency=1).generate(questions[::-1], 5)[::-1]
    other = vllm(vllm_url, renderer, **sampled).generate(questions, 6)
    texts = [[s.text for s in samples] for samples in first]
    assert texts == [[s.text for s in samples] for samples in second]
    assert texts != [[s.text for s in samples] for samples in other]
    assert len(set(texts[0])) == 3


@pytest.mark.slow
def test_another_template_than_the_servers_is_found_out(vllm_url, renderer, questions):
    longer = [Question(id=q.id, text=q.text, token_ids=(*(q.token_ids or ()), 5)) for q in questions]
    with pytest.raises(ValueError, match="its chat template is another one"):
        vllm(vllm_url, renderer, prompts="messages").generate(longer, 0)


@pytest.mark.slow
def test_vllms_server_says_its_version_and_its_limits(vllm_url, renderer, questions):
    assert vllm(vllm_url, renderer).version.startswith("vllm 0.")
    with pytest.raises(ValueError, match="HTTP 400"):
        vllm(vllm_url, renderer, max_new_tokens=4000).generate(questions[:1], 0)
