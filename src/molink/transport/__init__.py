"""How bytes cross: gRPC with mutual TLS between machines, unix sockets within one."""

import os

# gRPC reads both while it is imported. Its fork handlers can abort a child that an agent starts;
# failed handshakes of strangers are told in our own words (`credentials.diagnose`).
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
