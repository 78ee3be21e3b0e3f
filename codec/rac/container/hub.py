"""The Hugging Face Hub: repositories at one commit, bytes of their files by ranges. The door of `huggingface_hub`."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

from rac.container.access import Access, ChangedError, FileAccess
from rac.container.remote import BACKOFF, RETRIES, STALL, Broken, Remote
from rac.errors import MissingDependencyError, RacError, SourceError

T = TypeVar("T")
SCHEME = "hf://"
WAIT = 120.0  # seconds that the Hub may ask us to wait when it is asked too often
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"({_PART}/{_PART})(?:@(.+))?")
_URL = re.compile(rf"hf://(?:models/)?({_PART}/{_PART})(?:@(refs/pr/\d+|[^/]+))?(?:/(.*))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)$")
_BUSY = (408, 425, 429, 500, 502, 503, 504)


class Address(NamedTuple):
    """What a name means: a repository, a revision (None: the main branch), a file in it (empty: none is named)."""

    repository: str
    revision: str | None
    file: str = ""


def address(name: str) -> Address | None:
    """What `hf://ORG/NAME[@REVISION][/FILE]` or `ORG/NAME[@REVISION]` means; None for what is neither, or is a path."""
    if name.startswith(SCHEME):
        found = _URL.fullmatch(name)
        if not found:
            raise SourceError("is no hf://ORG/NAME[@REVISION][/FILE]", file=name)
        return Address(found[1], found[2] and unquote(found[2]), found[3] or "")
    if not (match := _ID.fullmatch(name)) or os.path.lexists(name) or os.path.isdir(os.path.dirname(name)):
        return None
    if match[1].endswith(_FILES):
        return None
    try:
        library()
    except MissingDependencyError as e:
        raise MissingDependencyError(f"no such path; and {e.message}", file=name) from e
    return Address(match[1], match[2])


_FILES = (".rac", ".safetensors", ".gguf", ".bin", ".pt", ".npz", ".onnx", ".h5")
"""Endings of what is a path, though it reads like an id."""


def library() -> Any:
    """The package; MissingDependencyError where it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils

        return huggingface_hub
    except ImportError as e:
        raise MissingDependencyError("the Hub needs `pip install rac-codec[hub]`") from e


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository at a commit."""

    repository: str
    commit: str
    name: str
    size: int
    sha256: str | None = None  # as the Hub states it, in hexadecimal; of files that git itself holds it does not
    blob: str | None = None  # of these: their name as objects of git

    @property
    def url(self) -> str:
        """Its address, with the commit."""
        return f"{SCHEME}{self.repository}@{self.commit}/{self.name}"

    @property
    def cached(self) -> str | None:
        """Path of the file in the Hub's cache; None where it is not there whole."""
        path = library().try_to_load_from_cache(self.repository, self.name, revision=self.commit)
        return path if isinstance(path, str) and os.path.getsize(path) == self.size else None

    def open(self) -> Access:
        """The file in the cache, or on the Hub."""
        return FileAccess(path, self.url) if (path := self.cached) else HubAccess(self)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All files of a repository at one commit, by name."""

    repository: str
    commit: str
    files: Mapping[str, HubFile]

    @classmethod
    def of(cls, where: Address) -> Snapshot:
        """What the Hub lists now; SourceError where there is no such repository or revision, or no access to it."""
        api, name = library().HfApi(library_name="rac-codec"), where.repository
        info = _ask(lambda: api.model_info(name, revision=where.revision), where)
        rows = _ask(lambda: list(api.list_repo_tree(name, revision=info.sha, recursive=True)), where)
        files = {}
        for row in rows:
            if hasattr(row, "blob_id"):
                lfs = row.lfs
                size, sha256 = (row.size, None) if lfs is None else (lfs.size, lfs.sha256)
                files[row.path] = HubFile(name, info.sha, row.path, size, sha256, None if lfs else row.blob_id)
        return cls(name, info.sha, files)


def open_file(url: str) -> Access:
    """The file that an hf:// URL names, out of the cache where it lies whole there, else by ranges."""
    where = address(url)
    if where is None or not where.file:
        raise SourceError("names no file: hf://ORG/NAME[@REVISION]/FILE", file=url)
    hub = library()
    try:
        place = hub.hf_hub_url(where.repository, where.file, revision=where.revision, endpoint=hub.HfApi().endpoint)
        found = _ask(lambda: hub.get_hf_file_metadata(place, timeout=STALL), where)
    except UnreachableError:
        path = hub.try_to_load_from_cache(where.repository, where.file, revision=where.revision)
        if isinstance(path, str):
            return FileAccess(path, url)
        raise
    tag = found.etag or ""
    if found.size is None or found.commit_hash is None:
        raise SourceError("the Hub states neither its size nor its commit", file=url)
    sha256 = tag if _SHA256.fullmatch(tag) else None
    return HubFile(where.repository, found.commit_hash, where.file, found.size, sha256).open()


def archive_of(where: Address, keep: bool = False) -> str:
    """URL of the one archive, or of the first shard of the one set, in a repository; else SourceError.

    With `keep` it is downloaded to the Hub's cache, and this is its path there.
    """
    hub = library()
    try:
        snapshot = Snapshot.of(where)
        names, commit = list(snapshot.files), snapshot.commit
    except UnreachableError:
        found = cached_snapshot(where)
        if found is None:
            raise
        names, commit, keep = os.listdir(found), os.path.basename(found), True
    said = SCHEME + where.repository
    archives = sorted(n for n in names if n.endswith(".rac"))
    first = [n for n in archives if not (m := re.search(r"-(\d{5})-of-\d{5}\.rac$", n)) or int(m[1]) == 1]
    if len(first) != 1:
        why = f"has {len(first)} archives; name one: {said}/{first[0]}" if first else "has no .rac file"
        raise SourceError(why, file=said)
    if not keep:
        return f"{said}@{commit}/{first[0]}"
    members = [n for n in archives if n == first[0] or _stem(n) == _stem(first[0]) != n]
    get = hub.hf_hub_download
    with quiet():
        paths = [_ask(lambda n=n: get(where.repository, n, revision=where.revision), where) for n in members]  # type: ignore[misc]
    if any(f"/{commit}/" not in p.replace(os.sep, "/") for p in paths):
        raise ChangedError("changed on the Hub while it was downloaded; try again", file=said)
    return str(paths[0])


def _stem(name: str) -> str:
    return re.sub(r"-\d{5}-of-\d{5}\.rac$", "", name)


def cached_snapshot(where: Address) -> str | None:
    """Folder of the revision in the cache, whatever is there of it."""
    revision = where.revision or "main"
    with contextlib.suppress(library().errors.CacheNotFound):
        for repo in library().scan_cache_dir(library().constants.HF_HUB_CACHE).repos:
            for found in repo.revisions if (repo.repo_type, repo.repo_id) == ("model", where.repository) else ():
                if found.commit_hash == revision or revision in found.refs:
                    return str(found.snapshot_path)
    return None


def upload(
    repository: str,
    files: Mapping[str, str | bytes],
    message: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> tuple[str, list[str]]:
    """One commit with these files (paths, or what is in them); returns its address, and the names of what it holds.

    The repository and the branch `revision` are made where they are not there; `private` matters only then. Files
    of `beside` are left out where the repository has one of that name. SourceError where the Hub refuses.
    """
    where = Address(repository, revision)
    hub = library()
    api = hub.HfApi(library_name="rac-codec")
    _ask(lambda: api.create_repo(repository, private=private, exist_ok=True), where)
    if revision:
        _ask(lambda: api.create_branch(repository, branch=revision, exist_ok=True), where)
    there = Snapshot.of(where).files
    chosen = {**files, **{n: d for n, d in (beside or {}).items() if n not in there}}
    operations = [hub.CommitOperationAdd(name, data) for name, data in chosen.items()]
    with mapped(where), quiet():  # the package itself tries uploads again
        done = api.create_commit(repository, operations, commit_message=message, revision=revision)
    return str(done.commit_url), list(chosen)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars of `huggingface_hub` where nobody sees them."""
    utils = library().utils
    hide = not sys.stderr.isatty() and not utils.are_progress_bars_disabled()
    if hide:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            utils.enable_progress_bars()


class UnreachableError(SourceError):
    """The Hub does not answer, or is not to be asked."""


def _ask(call: Callable[[], T], where: Address) -> T:
    """What a request brings; asked again where the Hub is busy or the connection breaks. SourceError where it fails."""
    for attempt in range(RETRIES + 1):
        with mapped(where):
            try:
                return call()
            except library().errors.HfHubHTTPError as e:
                if e.response.status_code not in _BUSY or attempt == RETRIES:
                    raise
                wait = _patience(e.response.headers, where)
            except library().errors.OfflineModeIsEnabled:
                raise
            except (OSError, ValueError):
                raise
            except Exception:  # of the HTTP library below
                if attempt == RETRIES:
                    raise
                wait = 0.0
        time.sleep(max(wait, min(5.0, BACKOFF * 2**attempt)))
    raise AssertionError


def _patience(headers: Mapping[str, str], where: Address) -> float:
    """Seconds to wait before the next request; SourceError where the Hub asks for too many of them."""
    told = headers.get("Retry-After", "")
    limit = re.search(r"r=0;t=(\d+)", headers.get("RateLimit", ""))
    wait = float(limit[1] if limit else told) if limit or told.isdecimal() else 0.0
    if wait > WAIT:
        raise SourceError(f"the Hub is asked too often: it says to wait {wait:.0f} s", file=_said(where))
    return wait


def _said(where: Address) -> str:
    at = f"@{where.revision}" if where.revision else ""
    return f"{SCHEME}{where.repository}{at}" + (f"/{where.file}" if where.file else "")


@contextlib.contextmanager
def mapped(where: Address) -> Iterator[None]:
    """What `huggingface_hub` raises, as a SourceError that says what was not found and what to do."""
    errors = library().errors
    login = "log in by `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except RacError:
        raise
    except errors.OfflineModeIsEnabled as e:
        raise UnreachableError("the Hub is not asked, as HF_HUB_OFFLINE is set", file=_said(where)) from e
    except errors.GatedRepoError as e:
        page = f"{library().HfApi().endpoint}/{where.repository}"
        raise SourceError(f"is gated: ask for access at {page}, and {login}", file=_said(where)) from e
    except errors.RepositoryNotFoundError as e:
        why = f"no such repository, or a private one; for those {login}"
        raise SourceError(why, file=SCHEME + where.repository) from e
    except errors.RevisionNotFoundError as e:
        raise SourceError(f"has no revision {where.revision!r}", file=SCHEME + where.repository) from e
    except errors.EntryNotFoundError as e:
        raise SourceError("no such file in the repository", file=_said(where)) from e
    except errors.HfHubHTTPError as e:
        status = e.response.status_code
        more = f"; {login}" if status in (401, 403) else ""
        raise SourceError(f"the Hub answers {status} {e.response.reason_phrase}{more}", file=_said(where)) from e
    except ValueError as e:  # no such names
        raise SourceError(str(e), file=_said(where)) from e
    except Exception as e:  # of the HTTP library below
        why = " ".join(str(e.__cause__ or e).split()) or type(e).__name__
        raise UnreachableError(f"the Hub cannot be reached: {why}", file=_said(where)) from e


class HubAccess(Remote):
    """A file of the Hub, by ranges."""

    def __init__(self, file: HubFile) -> None:
        super().__init__(file.url, None)
        self.size, self.file = file.size, file
        self._where = Address(file.repository, file.commit, file.name)
        self._place: str | None = None  # where the Hub has sent us, for the next requests
        self._lock = threading.Lock()
        self._tag: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return HubAccess, (self.file,)

    def _forked(self) -> None:
        """The package opens connections of its own in a child."""

    def _some(self, at: int, out: memoryview) -> int:
        hub, place = library(), self._place
        headers = {"Range": f"bytes={at}-{at + len(out) - 1}", "Accept-Encoding": "identity"}
        if place is None:
            headers |= hub.utils.build_hf_headers(library_name="rac-codec")
        url = place or hub.hf_hub_url(
            self.file.repository, self.file.name, revision=self.file.commit, endpoint=hub.HfApi().endpoint
        )
        got = 0
        try:
            with hub.utils.get_session().stream("GET", url, headers=headers, timeout=STALL) as r:
                self._check(at, r, place)
                for piece in r.iter_bytes():
                    some = piece[: len(out) - got]
                    out[got : got + len(some)] = some
                    got += len(some)
                    if r.status_code == 200 and got == len(out):  # the rest of the file would follow
                        break
        except (RacError, KeyboardInterrupt, Broken):
            raise
        except hub.errors.OfflineModeIsEnabled as e:
            raise UnreachableError("HF_HUB_OFFLINE is set", file=self.name) from e
        except Exception as e:  # of the HTTP library: the connection broke
            raise Broken(got) from e
        return got

    def _check(self, at: int, r: Any, place: str | None) -> None:
        """Broken where it is worth asking again, SourceError unless this is that part of the file that was listed."""
        if r.status_code in _BUSY:
            self._closed.wait(_patience(r.headers, self._where))
            raise Broken(0) from OSError(f"{r.status_code} {r.reason_phrase}")
        if r.status_code >= 400 and place is not None:  # such addresses are good for a while
            self._place = None
            raise Broken(0) from OSError(f"{r.status_code} {r.reason_phrase}")
        if r.status_code >= 400:
            r.read()
            with mapped(self._where):
                library().utils.hf_raise_for_status(r)
        for one in (*r.history, r):  # a repository that was renamed sends us on first
            commit, tag = one.headers.get("X-Repo-Commit"), one.headers.get("X-Linked-Etag", "").strip('"')
            if commit not in (None, self.file.commit) or (self.file.sha256 and tag not in ("", self.file.sha256)):
                raise ChangedError("changed on the Hub while it was read: another commit is there now", file=self.name)
        if r.status_code == 200 and not at:  # all of a file from its beginning: as good
            return
        stated = _RANGE.match(r.headers.get("Content-Range", ""))
        if r.status_code != 206 or not stated or int(stated[1]) != at:
            raise SourceError("the Hub does not answer with the range that was asked for", file=self.name, offset=at)
        with self._lock:
            now = r.headers.get("ETag")
            self._tag = self._tag or now
            if int(stated[3]) != self.size:
                why = f"has {int(stated[3])} bytes where the Hub lists {self.size}; was it uploaded whole?"
                raise ChangedError(why, file=self.name)
            if now != self._tag:
                raise ChangedError("changed on the Hub while it was read: it has another ETag", file=self.name)
            if r.history:
                self._place = str(r.url)
