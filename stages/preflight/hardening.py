"""Rules about what guards a system or should not leave it: SELinux, keys of the host, credentials, histories."""

from __future__ import annotations

import errno
import re
from collections.abc import AsyncIterator

from stages.preflight.findings import Evidence, Outcome, failed, passed
from stages.preflight.rules import Rule, Target
from stages.preflight.subject import Subject
from stages.preflight.texts import exists, names_in, read_text

_ACCOUNTS_MAX = 200
_SHOWN = 8
_SECRETS = (
    (".aws/credentials", "credentials of AWS"),
    (".config/gcloud/credentials.db", "credentials of Google Cloud"),
    (".azure/msal_token_cache.json", "tokens of Azure"),
    (".azure/accessTokens.json", "tokens of Azure"),
    (".aliyun/config.json", "credentials of Alibaba Cloud"),
    (".tccli/default.credential", "credentials of Tencent Cloud"),
    (".oci/oci_api_key.pem", "a key of Oracle Cloud"),
    (".kube/config", "credentials of Kubernetes"),
    (".docker/config.json", "credentials of container registries"),
    (".ssh/id_rsa", "a private key"),
    (".ssh/id_ecdsa", "a private key"),
    (".ssh/id_ed25519", "a private key"),
    (".bash_history", "a history of commands"),
    (".zsh_history", "a history of commands"),
)


async def check_selinux(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether SELinux stands in the way of what an import changes."""
    config = await read_text(subject.view, "/etc/selinux/config")
    mode, where = "", Evidence(config.path)
    for number, line in config.numbered():
        if match := re.match(r"SELINUX=(\w+)", line):
            mode, where = match[1].lower(), config.at(number)
    for entry in subject.menus.entries[:1]:
        if entry.value("selinux") == "0":
            mode, where = "disabled", entry.where
        elif entry.value("enforcing") == "0" and mode == "enforcing":
            mode, where = "permissive", entry.where
    if await exists(subject.view, "/.autorelabel"):
        yield failed(
            "info",
            "the first boot labels every file anew (/.autorelabel), which takes minutes, and then starts again",
            Evidence("/.autorelabel"),
            command="rm /.autorelabel",
        )
        return
    if mode != "enforcing":
        yield passed(f"SELinux is {mode or 'not set up'}", where)
        return
    yield failed(
        "info",
        "SELinux is enforcing: files that an import changes lose their labels, and a login may be refused for it",
        where,
        command=f"sed -i '{where.line}s/enforcing/permissive/' {config.path}",
    )


async def check_secrets(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """What of this machine's own travels with the image."""
    found: dict[str, list[Evidence]] = {}
    for name in await names_in(subject.view, "/etc/ssh"):
        if re.fullmatch(r"ssh_host_\w+_key", name):
            found.setdefault("the SSH server's own keys", []).append(Evidence(f"/etc/ssh/{name}"))
    for home in await _homes(subject):
        for path, what in _SECRETS:
            if await _is_there(subject, f"{home}/{path}"):
                found.setdefault(what, []).append(Evidence(f"{home}/{path}"))
    if not found:
        yield passed("no keys, credentials or histories were found")
        return
    places = [one for ones in found.values() for one in ones]
    yield failed(
        "info",
        f"{', '.join(found)} travel with the image: remove them before it becomes one for many machines",
        *places[:_SHOWN],
        remedy="Remove what others must not have; keys of the SSH server are made again by `ssh-keygen -A`.",
    )


async def _homes(subject: Subject) -> list[str]:
    text = await read_text(subject.view, "/etc/passwd")
    homes = [line.split(":")[5] for _, line in text.numbered() if line.count(":") == 6]
    return list(dict.fromkeys(one.rstrip("/") for one in homes if len(one) > 1 and one.startswith("/")))[:_ACCOUNTS_MAX]


async def _is_there(subject: Subject, path: str) -> bool:
    try:
        return (await subject.view.stat(path)).size > 0
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise  # what may not be looked at is not nothing


RULES = (
    Rule(
        id="sec.selinux",
        title="SELinux does not stand in the way",
        why=(
            "An import writes files without labels: under enforcing SELinux a changed /etc/shadow can refuse every "
            "login until the system is labelled anew. Tencent's online tool and Alibaba ask to switch it off."
        ),
        check=check_selinux,
    ),
    Rule(
        id="sec.secrets",
        title="nothing secret travels unnoticed",
        why=(
            "Keys of the SSH server, credentials, private keys and histories of commands are part of the disk. That is "
            "right for a machine that moves, and wrong for an image that many machines are made of. They are never "
            "read, only found."
        ),
        check=check_secrets,
    ),
)
