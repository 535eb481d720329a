"""What `molink serve` adds to the flags of vLLM's HTTP server, alone and over a pipeline."""

import json
import os

from molink.cli.flags import value_of, values_of
from molink.gateway import chat_stop, chat_templates

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
