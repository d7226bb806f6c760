"""The board answers its own page alone, and sees the runs of one directory."""

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest
from starlette.testclient import TestClient

from fitune.board.access import POLICY
from fitune.board.page import SCRIPTS, asset, board_page
from fitune.board.planner import Planner
from fitune.board.processes import Launcher
from fitune.board.server import application
from fitune.cli.app import main
from fitune.language.chinese import CHINESE

TOKEN = "right-token"
OWN = {"host": "127.0.0.1:8765", "x-fitune-token": TOKEN}


@pytest.fixture
def client(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """What the page could ask, for runs in `tmp_path`; its planning process is never started."""
    logs = tmp_path_factory.mktemp("logs")
    with Planner() as planner:
        app = application(tmp_path, token=TOKEN, planner=planner, launcher=Launcher(logs))
        yield TestClient(app, base_url="http://127.0.0.1:8765")


ATTACKS: dict[str, dict[str, str]] = {
    "another name that was rebound": {"host": "evil.example:8765"},
    "a name that begins like ours": {"host": "127.0.0.1.evil.example"},
    "no host": {"host": ""},
    "a page of another origin": {"origin": "http://evil.example"},
    "a file on the disk": {"origin": "null"},
    "another port of this machine": {"origin": "http://127.0.0.1:9999", "sec-fetch-site": "same-site"},
    "a link or picture elsewhere": {"sec-fetch-site": "cross-site"},
}  # fmt: skip


@pytest.mark.parametrize("headers", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize(
    "path", ["/", "/assets/shell.js", "/api/choices", "/api/start", "/api/stop"]
)
def test_what_another_page_asks_is_refused_even_with_the_token(
    client: TestClient, path: str, headers: dict[str, str]
) -> None:
    method = "POST" if path in ("/api/start", "/api/stop") else "GET"
    answer = client.request(
        method, path, headers=OWN | headers, json={} if method == "POST" else None
    )
    assert answer.status_code == 403
    assert not {"set-cookie", "access-control-allow-origin"} & set(answer.headers)


@pytest.mark.parametrize("token", [None, "", "wrong-token", TOKEN + "x"])
@pytest.mark.parametrize("path", ["/api/choices", "/api/processes", "/api/no-such-route"])
def test_nothing_is_told_without_the_token(
    client: TestClient, path: str, token: str | None
) -> None:
    headers = {} if token is None else {"x-fitune-token": token}
    answer = client.get(path, headers=headers)
    assert answer.status_code == 403
    assert "the token is missing or old" in answer.json()["error"]


def test_own_requests_are_answered_also_by_a_forwarded_port(client: TestClient) -> None:
    for host in ("127.0.0.1:8765", "localhost:9000"):
        own = OWN | {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
        assert client.get("/api/processes", headers=own).json() == {"processes": []}


def test_the_page_runs_no_script_but_its_own_and_reaches_no_other_place(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.headers["content-security-policy"] == POLICY
    assert "script-src 'self';" in POLICY
    scripts = re.findall(r"<script(.*?)>", answer.text)
    assert sum("src=" in each for each in scripts) == len(SCRIPTS)
    assert all("src=" in each or 'type="application/json"' in each for each in scripts)
    assert not re.search(
        r"https?://", answer.text + "".join(map(asset, SCRIPTS)).replace("http://www.w3.org", "")
    )
    assert TOKEN not in answer.text


NAMES = (
    "..",
    ".",
    "",
    "../outside",
    "/etc",
    "a/b",
    "nul\0",
    "link",
    "no-such-run",
    "x" * 900,
    "<img src=x>",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["stop", "resume"])
def test_a_name_leads_to_no_place_outside_of_the_runs(
    client: TestClient, tmp_path: Path, what: str, name: str
) -> None:
    outside = tmp_path.parent / "outside"
    (outside / "checkpoints").mkdir(parents=True, exist_ok=True)
    (outside / "lock").touch()
    (tmp_path / "link").symlink_to(outside)
    answer = client.post(f"/api/{what}", headers=OWN, json={"run": name})
    assert answer.status_code == 400
    assert len(answer.json()["error"].splitlines()) == 1


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"not JSON", "is JSON"),
        (b"[" * 100_000, "is JSON"),
        (b'{"run": 3}', "does not understand 'run'"),
        (b'{"run": "a", "shell": "rm"}', "does not understand 'shell'"),
        (b'{"run": "' + b"a" * 1_100_000 + b'"}', "at most 1,000,000 bytes"),
    ],
)
def test_a_body_of_another_form_is_refused_in_a_sentence(
    client: TestClient, body: bytes, told: str
) -> None:
    headers = OWN | {"content-type": "application/json"}
    answer = client.post("/api/stop", headers=headers, content=body)
    assert answer.status_code == 400
    assert told in answer.json()["error"]
    form = client.post("/api/stop", headers=OWN | {"content-type": "text/plain"}, content=b"{}")
    assert "send content-type application/json" in form.json()["error"]


def test_a_refusal_is_in_the_language_of_the_page(client: TestClient) -> None:
    chinese = client.post("/api/stop", headers=OWN | {"x-fitune-language": "zh"}, json={"run": "x"})
    assert "不是" in chinese.json()["error"]


def test_what_the_scripts_say_has_its_chinese() -> None:
    titles = r'(?:text|slider|combobox|copy)\("(?:[\w.]+", ")?([A-Z][^"]*)"|title: "([^"]*)"|: "([A-Z][a-z][\w ]+)"'
    said = {
        text
        for name in SCRIPTS
        for found in re.finditer(rf'say\("([^"]*)"|{titles}', asset(name))
        for text in found.groups()
        if text
    }
    assert len(said) > 50
    assert said - CHINESE.keys() - {"LoRA"} == set()
    assert (
        json.loads(re.findall(r'json" id="fitune-words">(.*?)</script>', board_page())[0])
        == CHINESE
    )


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The command itself on a free port, and the address that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fitune", "board", "runs", "--port", "0"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    yield process, process.stdout.readline().strip()
    process.kill()
    process.communicate()


def test_the_command_says_where_the_page_is_and_ends_by_ctrl_c(
    served: tuple["subprocess.Popen[str]", str],
) -> None:
    process, url = served
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/#token=[\w-]{32}", url)
    with urlopen(url.partition("#")[0]) as page:
        assert b"fitune-words" in page.read()
    assert psutil.Process(process.pid).memory_info().rss < 300e6
    listening = psutil.Process(process.pid).net_connections()
    assert {each.laddr.ip for each in listening if each.status == "LISTEN"} == {"127.0.0.1"}
    # a request that is still answered is cut off in silence
    place, token = url.removeprefix("http://").split("/#token=")
    connection = HTTPConnection(place)
    body = json.dumps({"settings": {"model.source": "minimind2", "memory.gpu": "RTX 3060 12GB"}})
    headers = {"x-fitune-token": token, "content-type": "application/json"}
    connection.request("POST", "/api/plan", body, headers)
    assert connection.getresponse().readline() == b"event: commands\n"
    planning = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "ssh -L" in told
    assert "Traceback" not in told
    assert psutil.wait_procs(planning, timeout=10)[1] == []
    connection.close()


def test_a_port_in_use_is_said_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["board", "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"error: port {port} is in use, perhaps by another board: give another one with --port\n"
    )
    assert main(["board", "--port", "99999"]) == 2
