"""Licences of bases: asked of a Hub by the real client, unknown where it does not say, never a reason to fail."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import run_python

from cornstarch_hf.hub.card_facts import find_licenses, license_fields

COMMIT = "0a" * 20
CARDS = {
    "user/apache": {"license": "apache-2.0"},
    "user/named": {"license": "other", "license_name": "llama3.1"},
    "user/hostile": {"license": "mit | [x](http://y)\n# injected"},
    "user/listed": {"license": ["mit", "apache-2.0"]},
    "user/silent": {},
    "user/cardless": None,
}
ASK = """
import json, os, sys
os.environ.update(HF_ENDPOINT=sys.argv[1], HF_HUB_OFFLINE=sys.argv[2])
from cornstarch_hf.hub.card_facts import find_licenses
token = {"none": None, "false": False}.get(sys.argv[4], sys.argv[4])
print(json.dumps(find_licenses(json.loads(sys.argv[3]), token=token)))
"""


class Models(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("authorization")))
        repo = self.path.removeprefix("/api/models/").split("/revision/")[0]
        found = repo in CARDS and self.path.endswith(COMMIT)
        status = 200 if found else 500 if repo == "user/broken" else 401
        body = {"id": repo, "sha": COMMIT, "siblings": []} | (
            {"cardData": CARDS[repo]} if found and CARDS[repo] is not None else {}
        )
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body if found else {"error": "no"}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Models)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(hub, *repos, offline="0", token="none"):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    return json.loads(run_python(ASK, endpoint, offline, json.dumps(dict.fromkeys(repos, COMMIT)), token))


def test_the_hub_is_asked_at_the_commit_and_only_identifiers_are_taken(hub):
    found = ask(hub, *CARDS, "user/private", "user/broken", token="hf_secret")
    assert found == {
        "user/apache": "apache-2.0",
        "user/named": "llama3.1",
        "user/hostile": None,
        "user/listed": None,
        "user/silent": None,
        "user/cardless": None,
        "user/private": None,
        "user/broken": None,
    }
    asked = [(path, key) for path, key in hub.asked if path.startswith("/api/models/")]
    assert {path for path, _ in asked} == {f"/api/models/{repo}/revision/{COMMIT}" for repo in found}
    assert {key for _, key in asked} == {"Bearer hf_secret"}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"offline": "1"}, {"token": "false"}])
def test_nothing_is_asked_offline_or_when_told_so(hub, options):
    assert ask(hub, "user/apache", **options) == {"user/apache": None} and hub.asked == []


def test_given_licences_are_not_asked_for():
    assert find_licenses({"user/a": COMMIT, "user/b": COMMIT}, {"user/a": "mit"}, token=False) == {
        "user/a": "mit",
        "user/b": None,
    }
    with pytest.raises(
        ValueError, match=r"licenses\['user/a'\] must be an identifier such as 'apache-2.0', got 'my own'"
    ):
        find_licenses({}, {"user/a": "my own"})


@pytest.mark.parametrize(
    ("own", "bases", "fields"),
    [
        (None, ["mit", "mit"], {"license": "mit"}),
        (None, ["mit", "apache-2.0"], {"license": "other", "license_name": "those-of-its-parts"}),
        (None, ["mit", None, "apache-2.0"], {"license": "other", "license_name": "those-of-its-parts"}),
        (None, ["mit", None], {}),
        (None, [None], {}),
        (None, [], {}),
        ("cc-by-4.0", ["mit", None], {"license": "cc-by-4.0"}),
    ],
)
def test_what_the_metadata_says(own, bases, fields):
    assert license_fields(own, bases) == fields


def test_an_own_licence_is_an_identifier():
    with pytest.raises(ValueError, match="license must be an identifier such as 'apache-2.0', got 'a\\\\nb'"):
        license_fields("a\nb", [])
