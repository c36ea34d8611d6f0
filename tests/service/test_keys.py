"""Request ids, counts of refusals, API keys and their limits."""

from __future__ import annotations

from starlette.routing import Route

from service.app import create_app
from service.settings import Settings
from tests.service.conftest import StartServer
from tests.service.refusals import USER, refusal
from tests.service.server import Server, chat_body


def test_every_answer_of_a_post_route_has_an_id_that_the_log_has_too(start_server: StartServer) -> None:
    server = start_server(api_key="key", max_num_seqs=1, max_waiting=0)
    key = {"Authorization": "Bearer key"}
    chat, form = {"messages": [USER], "max_tokens": 1}, {"prompt": "hi", "max_tokens": "1"}
    logged: list[str] = []
    for path, good, bad in (
        ("/v1/chat/completions", {"json": chat}, {"json": {"messages": []}}),
        ("/v1/chat/completions", {"json": chat | {"stream": True}}, {"content": b"{"}),
        ("/v1/generate", {"data": form}, {"data": {"prompt": ""}}),
        ("/v1/generate", {"data": form | {"stream": "true"}}, {"data": form | {"top_p": "red"}}),
    ):
        for fields, headers, status in ((good, key, 200), (bad, key, 400), (good, {}, 401)):
            response = server.http.post(path, headers=headers, **fields)
            assert response.status_code == status, response.text
            assert response.headers["x-request-id"].startswith("chatcmpl-" if "chat" in path else "gen-")
            if status != 401:
                logged.append(f"id={response.headers['x-request-id']} ")
    server.wait(lambda: all(line in server.log_text() for line in logged))
    long = chat_body(stream=True, max_tokens=2000, ignore_eos=True)
    with server.http.stream("POST", "/v1/chat/completions", json=long, headers=key) as running:
        lines = running.iter_lines()
        next(lines)
        full = server.http.post("/v1/chat/completions", json=chat, headers=key)
        assert refusal(full, 503)["code"] == "queue_full"
        assert full.headers["x-request-id"] != running.headers["x-request-id"]


def test_refusals_are_counted_by_reason(server: Server) -> None:
    before = server.metric("flash_requests_rejected_total", reason="not_built")
    server.chat(prediction={"type": "content", "content": "x"})
    assert server.metric("flash_requests_rejected_total", reason="not_built") == before + 1


def test_with_keys_every_v1_route_wants_one_and_the_others_do_not(start_server: StartServer) -> None:
    server = start_server(api_key="first,second")
    requests = [("POST", f"/v1/{name}") for name in ("chat/completions", "completions", "responses", "messages")]
    requests += [("POST", "/v1/responses/input_tokens"), ("POST", "/v1/messages/count_tokens")]
    requests += [("POST", "/v1/generate"), ("POST", "/tokenize"), ("POST", "/detokenize")]
    requests += [("GET", "/v1/models"), ("GET", "/v1/models/demo")]
    routes = {route.path for route in create_app(Settings(), on_fatal=print).routes if isinstance(route, Route)}
    assert {path for path in routes if path.startswith(("/v1", "/tok", "/detok"))} == {
        path.replace("demo", "{name:path}") for _, path in requests
    }, "a /v1 route that this test does not know"
    for method, path in requests:
        for header in (None, "Bearer wrong", "Bearer", "Basic first", "Bearer \xfc"):
            headers = [] if header is None else [(b"Authorization", header.encode("latin-1"))]
            response = server.http.request(method, path, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"
    for key in ("first", "second"):
        assert server.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    for path in ("/livez", "/readyz", "/health", "/metrics", "/version", "/", "/static/app.js"):
        assert server.http.get(path).status_code == 200
    assert server.http.get("/health").json() == {"status": "ready"}
    assert server.http.get("/health", headers={"Authorization": "Bearer wrong"}).json() == {"status": "ready"}
    assert "workers" in server.http.get("/health", headers={"Authorization": "Bearer second"}).json()
    assert "first" not in server.log_text()


def test_a_keys_own_limit_is_a_429_and_leaves_other_keys_alone(start_server: StartServer) -> None:
    server = start_server(api_key="first,second", max_requests_per_key=1)
    first, second = ({"Authorization": f"Bearer {key}"} for key in ("first", "second"))
    body = chat_body(stream=True, max_tokens=2000, ignore_eos=True)
    with server.http.stream("POST", "/v1/chat/completions", json=body, headers=first) as running:
        lines = running.iter_lines()
        next(lines)
        again = server.http.post("/v1/chat/completions", json=chat_body(max_tokens=1), headers=first)
        assert refusal(again, 429)["type"] == "rate_limit_error"
        assert server.http.post("/v1/chat/completions", json=chat_body(max_tokens=1), headers=second).is_success
    server.http.headers.update(first)
    server.wait(lambda: server.health()["requests"] == 0)
    assert server.chat(max_tokens=1).is_success
