"""The errors a user of MoLink can meet.

MolinkError
├── UsageError        a flag, file or folder that cannot work; the message says what to change
├── TokenError        a join token that is damaged, expired or foreign
├── IdentityError     a certificate that does not prove what it should
├── WireError         bytes from elsewhere that break the protocol
├── AdmissionError    the head refused a node, or the node refused the head; names both values
├── PlanError         layer ranges that cannot make a pipeline; names nodes and layers
├── LinkError         another machine cannot be reached, or went away
├── HubError          the hub failed; a later start may find it well
├── StageError        a stage failed; carries what it said
│   └── PipelineDownError  a stage is lost, and with it what was under way
└── ProcessError      a process of this machine ended, or cannot be started
"""


class MolinkError(Exception):
    """Base of everything MoLink raises on purpose."""


class UsageError(MolinkError):
    """A flag, file or folder cannot work as given."""


class TokenError(MolinkError):
    """A join token is damaged, expired or belongs to another cluster."""


class IdentityError(MolinkError):
    """A certificate does not prove the identity it should."""


class WireError(MolinkError):
    """Bytes that came from elsewhere break the protocol."""


class AdmissionError(MolinkError):
    """A node may not take part; the message names both values that differ."""


class PlanError(MolinkError):
    """Layer ranges that cannot make a pipeline; the message names nodes and layers."""


class LinkError(MolinkError):
    """Another machine cannot be reached or went away."""


class HubError(MolinkError):
    """The hub of models failed in a way that may pass."""


class StageError(MolinkError):
    """A stage failed; the message carries what it said, `node` whose it is, where that is known."""

    def __init__(self, text: str, node: int | None = None) -> None:
        super().__init__(text)
        self.node = node


class PipelineDownError(StageError):
    """A stage of the pipeline is lost: what was under way gets no answer."""


class ProcessError(MolinkError):
    """A process of this machine ended by itself, or cannot be started; the message says why."""
