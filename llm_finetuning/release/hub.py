"""Uploading a finished folder to the Hugging Face Hub, compared with what the Hub then lists."""

from pathlib import Path

from huggingface_hub import HfApi

from llm_finetuning import colab
from llm_finetuning.files import checksums
from llm_finetuning.release.safety import check_no_pickles, check_no_tokens


def push_to_hub(folder: str | Path, repository: str, private: bool = True, api: HfApi | None = None) -> str:
    """Uploads a model or adapter folder to `repository` ("user/name"), made if it is not there; returns the URL.

    The token comes from Colab's secrets or HF_TOKEN. Files that the Hub already has are not sent again, so a stopped
    upload goes on. Every file is then compared with the Hub's own listing of the commit. `api`: the client (in tests).

    Raises ValueError for a folder that is not complete, for a repository that is public already where it should be
    private, or for a commit that differs; PermissionError without a token.
    """
    folder = Path(folder)
    is_adapter = (folder / "adapter_config.json").exists()
    if (folder / checksums.NAME).exists() or not is_adapter:
        checksums.verify_checksums(folder)
    check_no_pickles(folder)
    check_no_tokens(folder)
    if "/" not in repository:
        raise ValueError(f"hub_repository = {repository!r} is not user/name.")
    api = api or HfApi(token=colab.hub_token())
    url = api.create_repo(repository, private=private, exist_ok=True)
    if private and api.model_info(repository).private is False:
        raise ValueError(
            f"hub_private = True, but {repository} is there already and public. Make it private in its settings on the"
            " Hub, name another hub_repository, or set hub_private = False."
        )
    commit = api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message="Upload from the finetuning notebook",
        ignore_patterns=["**/.*", ".*"],
        delete_patterns="adapter_model*" if is_adapter else ["model*.safetensors", "model*.index.json"],
    )
    check_commit(api, folder, repository, commit.oid)
    return f"{url}/tree/{commit.oid}"


def check_commit(api: HfApi, folder: Path, repository: str, revision: str) -> None:
    """Compares every file with the Hub's listing of `revision`. Raises ValueError naming those that differ."""
    result = api.verify_repo_checksums(repository, revision=revision, local_dir=folder)
    absent = [name for name in result.extra_paths if not checksums.is_hidden(name)]  # hidden files are not uploaded
    wrong = sorted([*absent, *(mismatch["path"] for mismatch in result.mismatches)])
    if wrong:
        raise ValueError(
            f"{repository} at {revision} differs from {folder} in: {', '.join(wrong)}. Upload again; "
            "do not use that commit."
        )
