from anyio_channels.contract.layer import Inbox  # noqa
