"""A stand-in for object stores: one dictionary, which fsspec's clients and tensorstore (by HTTP, as Google's) read and write.

Like the real ones it has no folders but in names, and an object is there when all of it was sent, or not at all.
"""

import contextlib
import http.server
import io
import itertools
import json
import threading
import urllib.parse
from unittest import mock

import fsspec
from etils.epath import backend
from fsspec.registry import _registry
from orbax.checkpoint._src.path import gcs_utils

from ar_jax.files import places

OBJECTS: dict[str, tuple[int, bytes]] = {}  # "bucket/name" -> number of the writing, content
_down: set[str] = set()
_numbers = itertools.count(1)


def put(name: str, content: bytes) -> None:
    if any(part in name for part in _down):
        raise OSError(f"{name}: the network is down")
    OBJECTS[name] = next(_numbers), bytes(content)


@contextlib.contextmanager
def down(part: str):
    """Nothing can be written that has this in its name."""
    _down.add(part)
    try:
        yield
    finally:
        _down.clear()


class Bucket(fsspec.AbstractFileSystem):
    """Its client."""

    protocol = ("gs", "gcs", "s3")

    def info(self, path, **_):
        name = self._strip_protocol(path)
        if name in OBJECTS:
            number, content = OBJECTS[name]
            return {"name": name, "type": "file", "size": len(content), "generation": number}
        if any(other.startswith(f"{name}/") for other in OBJECTS):
            return {"name": name, "type": "directory", "size": 0}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **_):
        name = self._strip_protocol(path)
        rest = [other.removeprefix(f"{name}/") for other in list(OBJECTS) if other.startswith(f"{name}/")]
        names = sorted({f"{name}/{each.split('/')[0]}" for each in rest}) or [self.info(path)["name"]]
        return [self.info(each) for each in names] if detail else names

    def _open(self, path, mode="rb", **_):
        name = self._strip_protocol(path)
        if "r" in mode:
            self.info(path)
            return io.BytesIO(OBJECTS[name][1])
        return _Upload(name)

    def cat_file(self, path, start=None, end=None, **_):
        self.info(path)
        return OBJECTS[self._strip_protocol(path)][1][start:end]

    def cp_file(self, path1, path2, **_):
        if self.info(path1)["type"] == "directory":
            raise FileNotFoundError(path1)
        put(self._strip_protocol(path2), OBJECTS[self._strip_protocol(path1)][1])

    def rm(self, path, recursive=False, maxdepth=None):
        name = self._strip_protocol(path)
        names = [other for other in OBJECTS if other == name or (recursive and other.startswith(f"{name}/"))]
        if not names:
            raise FileNotFoundError(path)
        for each in names:
            del OBJECTS[each]

    def mkdir(self, path, create_parents=True, **_):
        pass

    makedirs = mkdir


class _Upload(io.BytesIO):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def close(self):
        if not self.closed:
            put(self.name, self.getvalue())
        super().close()


class _Server(http.server.BaseHTTPRequestHandler):
    """As much of Google's JSON API as tensorstore asks for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name, query = self._asked()
        if name is None:
            found = sorted(other.partition("/")[2] for other in OBJECTS if other.startswith(f"{self.bucket}/"))
            first, end = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
            self._say(200, json.dumps({"items": [{"name": each} for each in found if first <= each < end]}).encode())
        elif name not in OBJECTS:
            self._say(404)
        else:
            number, content = OBJECTS[name]
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1 if last else None] if first else content[-int(last) :]
            where = f"bytes {first or len(content) - len(part)}-{last or len(content) - 1}/{len(content)}"
            status, more = (206, {"Content-Range": where}) if "Range" in self.headers else (200, {})
            self._say(status, part, {"x-goog-generation": str(number), **more})

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        _, query = self._asked()
        name = f"{self.bucket}/{query['name']}"
        if int(query.get("ifGenerationMatch", OBJECTS.get(name, (0,))[0])) != OBJECTS.get(name, (0,))[0]:
            return self._say(412)
        try:
            put(name, content)
        except OSError:
            return self._say(403)
        about = {"name": query["name"], "generation": str(OBJECTS[name][0]), "size": str(len(content))}
        return self._say(200, json.dumps(about).encode())

    def do_DELETE(self):
        self._say(204 if OBJECTS.pop(self._asked()[0], None) else 404)

    def _asked(self):
        url = urllib.parse.urlsplit(self.path)
        self.bucket, _, rest = url.path.partition("/b/")[2].partition("/o")
        name = f"{self.bucket}/{urllib.parse.unquote(rest[1:])}" if rest else None
        return name, dict(urllib.parse.parse_qsl(url.query))

    def _say(self, status, content=b"", headers=None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def standing_in():
    """gs:// and s3:// lead here."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = {
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{server.server_port}",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    }
    places._client.cache_clear()
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    try:
        with (
            mock.patch.dict("os.environ", there),
            mock.patch.dict(_registry, dict.fromkeys(Bucket.protocol, Bucket)),
            # asks Google by a package of its own
            mock.patch.object(gcs_utils, "is_hierarchical_namespace_enabled", return_value=False),
        ):
            yield OBJECTS
    finally:
        server.shutdown()
        OBJECTS.clear()
