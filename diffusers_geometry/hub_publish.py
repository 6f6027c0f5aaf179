"""An audit on the Hub: as a dataset of its own, or as a pull request on the model it is of.

The dataset holds the whole audit, so that a stranger can read, check and repeat it. The pull request is small: a section of the
model's card and entries of ``.eval_results`` that point to that dataset (:mod:`.hub_card`); where the audit is no dataset, its
files come along in ``geometry_audit/``. Either is one commit on a known parent: a repository that was changed meanwhile is
refused, not overwritten. Publishing the same again changes nothing: what is there is compared by the hashes that the Hub shows
(git's SHA-1, SHA-256 for large files), and only what differs is sent. An audit is refused for a model whose weights it was not
made with. What is sent names neither this machine nor places on it (:mod:`.disclosure`); the folder's own files stay as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .disclosure import model_name, public_document
from .hub_card import results, section
from .hub_changes import changes, files_of
from .hub_errors import HubError, asked, offline
from .hub_folder import files_to_publish, note, published, read_audit, refuse_tokens

TITLE = "Geometry audit by diffusers_geometry"
_INSIDE_MODEL = "geometry_audit"


def publish(
    report_dir: str | Path,
    repo_id: str,
    *,
    kind: str = "dataset",
    token: str | bool | None = None,
    private: bool | None = None,
    parent_commit: str | None = None,
    dataset: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Puts an audit's folder on the Hub; the same again makes no new commit.

    Args:
        report_dir: Folder of a finished audit (docs/audit.md).
        repo_id: The dataset to make or to bring up to date; for a pull request the model that was audited.
        kind: "dataset", or "pull_request" (opened once, then brought up to date).
        token: One that may write; the machine's own if None.
        private: Whether a new dataset is private; None leaves it to the Hub. An existing public one is refused if True.
        parent_commit: The commit that the change is made on; the newest if None.
        dataset: For a pull request: the dataset that holds the audit. None for the one where this folder was published
            (``published.json`` in it says so); if there is none, the files come along and no results are entered, since a
            result must name a dataset.
        endpoint: The Hub; ``HF_ENDPOINT`` if None.

    Returns:
        Address of the dataset, or of the pull request (of the model if it is merged already).

    Raises:
        HubError: no finished audit there, a token in its files, other weights, no right to write, changed meanwhile, rate-limited.
    """
    from huggingface_hub import HfApi

    check_target(repo_id)
    if kind not in ("dataset", "pull_request"):
        raise HubError(f"kind={kind!r}. Expected 'dataset' or 'pull_request'.")
    if private and kind == "pull_request":
        raise HubError("private=True is of a dataset; who sees a pull request is said by its model. Expected kind='dataset'.")
    folder = Path(report_dir)
    audit, files = read_audit(folder), files_to_publish(folder)
    refuse_tokens(files, folder, token)
    audit = public_document(audit)
    api = HfApi(endpoint=endpoint, token=token)
    if kind == "dataset":
        call = lambda: _as_dataset(api, folder, audit, files, repo_id, private, parent_commit)  # noqa: E731
    else:
        call = lambda: _as_pull_request(api, folder, audit, files, repo_id, parent_commit, dataset)  # noqa: E731
    return asked(call, repo_id, revision=parent_commit, token=token, endpoint=endpoint, writes=True)


def check_target(repo_id: str) -> None:
    """Asks nothing of the Hub.

    Raises:
        HubError: no name of a repository, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        said = "" if "/" in repo_id else " (It says no owner.)"
    except HFValidationError as error:
        said = f" ({' '.join(str(error).split())})"
    if said:
        raise HubError(f"{repo_id!r} is no name of a repository of the Hub. Expected org/name.{said}")
    if offline():
        raise HubError(f"nothing can be published to {repo_id}: HF_HUB_OFFLINE is set. Expected to unset it, or to publish later.")


def _as_dataset(
    api: Any,
    folder: Path,
    audit: dict[str, Any],
    files: dict[str, Path | bytes],
    repo_id: str,
    private: bool | None,
    parent: str | None,
) -> str:
    from huggingface_hub import DatasetCardData, constants

    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    info = api.dataset_info(repo_id, revision=parent or constants.DEFAULT_REVISION)
    if private and not info.private:
        raise HubError(
            f"{repo_id} is public, and a private dataset was asked for. Expected another name, or to make it private first."
        )
    there = files_of(api, repo_id, "dataset", info.sha)
    if "audit.json" not in there and set(there) - {".gitattributes", "README.md"}:
        raise HubError(
            f"the dataset {repo_id} holds something else than an audit. Expected a name of its own, or that of an audit."
        )
    data = DatasetCardData(pretty_name=f"Geometry audit of {model_name(audit)}", tags=["diffusers-geometry", "model-audit"])
    head = f"---\n{data.to_yaml()}\n---\n\n".encode()
    contents: dict[str, Any] = {**files, "README.md": (head, section(audit, "report.md", repo_id))}
    operations = changes(api, repo_id, "dataset", info.sha, contents)
    url = f"{api.endpoint}/datasets/{repo_id}"
    sha = info.sha
    if operations:
        done = api.create_commit(repo_id, operations, commit_message=TITLE, repo_type="dataset", parent_commit=info.sha)
        sha = done.oid
    if operations or published(folder).get("dataset") != repo_id:
        note(folder, {"dataset": repo_id, "revision": sha, "url": url})
    return url


def _as_pull_request(
    api: Any,
    folder: Path,
    audit: dict[str, Any],
    files: dict[str, Path | bytes],
    repo_id: str,
    parent: str | None,
    dataset: str | None,
) -> str:
    from huggingface_hub import ModelCardData, constants

    info = api.model_info(repo_id, revision=parent or constants.DEFAULT_REVISION)
    _refuse_other_weights(api, repo_id, info.sha, audit)
    noted = published(folder)
    dataset = dataset or noted.get("dataset")
    contents: dict[str, Any] = {}
    if dataset:
        _refuse_unreadable(api, dataset, info)
        page = f"{api.endpoint}/datasets/{dataset}"
        report = f"{page}/blob/main/report.md"
        revision = noted["revision"] if noted.get("dataset") == dataset else None
        contents[f"{constants.EVAL_RESULTS_FOLDER}/diffusers_geometry.yaml"] = results(audit, dataset, revision, page)
    else:
        report = f"{_INSIDE_MODEL}/report.md"
        contents |= {f"{_INSIDE_MODEL}/{name}": path for name, path in files.items()}
    head = f"---\n{ModelCardData(library_name='diffusers').to_yaml()}\n---\n\n".encode()
    contents["README.md"] = (head, section(audit, report, dataset))

    operations = changes(api, repo_id, "model", info.sha, contents)
    if not operations:
        return f"{api.endpoint}/{repo_id}"
    for request in api.get_repo_discussions(repo_id, discussion_type="pull_request", discussion_status="open"):
        if request.title == TITLE:
            newest = api.model_info(repo_id, revision=request.git_reference).sha
            left = changes(api, repo_id, "model", newest, contents)
            if left and request.author != api.whoami()["name"]:
                continue  # somebody else's audit
            if left:
                api.create_commit(repo_id, left, commit_message=TITLE, revision=request.git_reference, parent_commit=newest)
            return request.url
    description = f"Made by `hf-geometry audit`. Audited: {model_name(audit)} at {audit['model']['revision']}."
    done = api.create_commit(
        repo_id, operations, commit_message=TITLE, commit_description=description, create_pr=True, parent_commit=info.sha
    )
    return done.pr_url


def _refuse_unreadable(api: Any, dataset: str, model: Any) -> None:
    """Refuses to point readers of a model to a dataset that they cannot open."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        is_private = api.dataset_info(dataset).private
    except RepositoryNotFoundError:
        raise HubError(
            f"the Hub has no dataset {dataset!r}, where the audit should be. Expected to publish it there first."
        ) from None
    if is_private and not model.private:
        raise HubError(
            f"the dataset {dataset} is private, and readers of {model.id} could not open what the card would point to. Expected a "
            "public dataset, or a private model."
        )


def _refuse_other_weights(api: Any, repo_id: str, revision: str, audit: dict[str, Any]) -> None:
    """Refuses an audit of other weights than the repository's, as far as the Hub shows their SHA-256."""
    audited = {name: digest for name, digest in audit["model"]["weights"].items() if name.endswith(".safetensors")}
    there = files_of(api, repo_id, "model", revision)
    for name, digest in audited.items():
        file = there.get(name)
        if file is None or (file.lfs and file.lfs.sha256 != digest):
            shown = "is not there" if file is None else f"has the sha256 {file.lfs.sha256[:12]}"
            raise HubError(
                f"the audit is of other weights than {repo_id} at {revision[:12]} has: {name} {shown}, audited was {digest[:12]}. "
                "Expected an audit of this model; its dataset may be published all the same."
            )
    if not audited:
        raise HubError("the audit names no weights (model.weights), so that it cannot be said whether it is of this model.")
