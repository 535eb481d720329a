"""What `molink serve` adds to the flags of vLLM's HTTP server, alone and over a pipeline."""

import json
import os

from molink.cli.flags import value_of, values_of, without
from molink.core.errors import UsageError
from molink.gateway import chat_stop, chat_templates
from molink.gateway.server import Tls

ANY_MODEL = "default"  # a name that the model has beside its own
GENERATE_MIDDLEWARE = "molink.gateway.generate.GenerateMiddleware"
CHAT_STOP_MIDDLEWARE = "molink.gateway.chat_stop.ChatStopMiddleware"


def http_flags(model: str, flags: list[str]) -> list[str]:
    """Flags after the user's own: `/generate`, the chat template they name, a name for any model.

    A template's stop strings go into the environment, where ChatStopMiddleware finds them.

    Raises:
        UsageError: there is no such chat template.
    """
    added = [f"--middleware={GENERATE_MIDDLEWARE}"]
    if (name := value_of(flags, "--chat-template")) is not None:
        found = chat_templates.find(name)
        added.append(f"--chat-template={found.template}")
        if found.stop:
            os.environ[chat_stop.STOP_VARIABLE] = json.dumps(found.stop)
            added.append(f"--middleware={CHAT_STOP_MIDDLEWARE}")
    names = values_of(flags, "--served-model-name")
    if not names and value_of(flags, "--config") is not None:
        return added  # the file may hold names, which ours would replace
    return [*added, "--served-model-name", *(names or [model]), ANY_MODEL]


def take_tls(flags: list[str]) -> tuple[Tls, list[str]]:
    """How the gateway serves HTTPS, and the flags without those that say so.

    Raises UsageError for what is not whole, or no files.
    """
    names = ("--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certs", "--ssl-cert-reqs")
    certfile, keyfile, ca_certs, reqs = (value_of(flags, name) for name in names)
    if certfile is None and keyfile is not None:
        raise UsageError("--ssl-keyfile needs --ssl-certfile")
    if reqs not in (None, "0", "1", "2"):
        raise UsageError(f"--ssl-cert-reqs {reqs}: expected 0 (none), 1 (optional) or 2 (required)")
    tls = Tls(certfile, keyfile, ca_certs, int(reqs or 0))
    tls.context()
    return tls, without(flags, *names)
