"""What every error of Isotherm's own is, and how an error is said in one line. Needs the standard library alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class IsothermError(Exception):
    """What Isotherm itself has to say: the message names the thing, the value and what would be right, and needs no
    traceback. Any other error but one of the system (a file, a port, a connection) is a bug.

    A class may have a second base (ValueError, ConnectionError, …) for those who catch by kind. Each lies with what
    raises it:

    What was asked to be served; change the manifest, the options or the files, and start again.
      ManifestError              cluster.manifest: a field of the manifest, and what it may be
      ModelNotFoundError         cluster.model.path: MODEL is no directory, hub id or manifest
      ProxyError                 cluster.proxies: a proxy that the environment names cannot be used
      ModelConfigError           cluster.model.config: config.json is of a model that cannot be served
      CheckpointError            cluster.model.checkpoint: a file or tensor is missing, or is not as it must be
        NoWeightFilesError       cluster.model.checkpoint: … there is neither a weight file nor an index
      NumericsError              cluster.model.fingerprint: a worker would not compute the others' bits
      TokenizerError             cluster.text.tokenizer: the tokenizer's files are missing or unusable
      NoChatTemplateError        cluster.text.tokenizer: the model can complete text, but not chat
        TiktokenError            cluster.text.tiktoken_vocabulary: … a tiktoken vocabulary cannot be read
      LinkChoiceError            cluster.control.link_choice: the manifest wants a link that cannot be
      WeightChoiceError          cluster.model.weight_choice: weights cannot be kept in these bits
      ConversionError            cluster.model.conversion: a checkpoint cannot be converted, or not to that place
      QualityError               cluster.cli.quality: what quantising loses cannot be measured
      KeysFileError              cluster.api.access.keys_file: a file of API keys cannot be used
        KeysFileUnreadableError  … it cannot even be read
      TracingError               cluster.observe.tracing: traces are wanted, and what makes them is not installed
      OfflineError               cluster.cli.offline: options of `isotherm generate` that do not fit

    The cluster as a whole; the message says which command to give, or which log to read.
      NoClusterError             cluster.on_ray.session: there is no cluster to attach to
      SeveralClustersError       cluster.on_ray.run_file: there are several, and none was named
      RayTokenError              cluster.on_ray.token_file: there is no place for Ray's token
      DatasetError               cluster.on_ray.datasets: a table that lies elsewhere cannot be read
      ServeError                 cluster.supervise.supervisor: the cluster did not start, or has ended
      NoAnswerError              cluster.deploy.first_answer: the workers are up, but no request is answered
      NoServerError              cluster.cli.chat: nothing answers at the URL
      ServedError, PlotError     cluster.cli.bench_served, bench_plot: a measurement cannot be made
      OwnClusterError            cluster.cli.own_cluster: the cluster of a command did not start

    One request; the front door says it with a status, and the client as an error of its own.
      ReplyError                 cluster.api.errors: what the front door answers; 4xx is the sender's to mend
        ContextLengthError       … the request has more tokens than the context
        StreamedError            … its client looks for it in the stream that it has asked for
      ChatTemplateError          cluster.text.chat_template: the template refuses these messages
        ChatTemplateLimitError   … it took too long, or too much
        ChatTemplateBrokenError  … it does not compile: our operator's to mend, as where it refuses any message
      GrammarError               cluster.text.json_schema: what the output is to be cannot be had
        SlowGrammarError         … compiling it takes too long
        ToolSchemaError          … a tool's schema cannot be enforced in the model's format
        UndeclarableError        cluster.text.typescript_tools: … a tool cannot be declared in TypeScript
      QueueFullError             cluster.engine.places: as many requests as there may be; try again later
      EngineUnavailableError     cluster.api.engine_client: no shard can take it now; try again later
        EngineOverloadedError    … as many requests as there may be
        WeightsGoneError         … and none ever will: the weights that it is bound to are served no more
      GenerationError            cluster.api.choices: the engine gave up on it
        DeadlineError            … its time is over
        OwnFaultError            … it asks for what cannot be; answered with 400

    A change of the running cluster; what was before serves on.
      OperationError             cluster.messages.operations: it cannot be taken; names the field
      PlacementChangeError       cluster.messages.operations: these groups and slots do not allow it

    What workers tell each other. These are handled: others take the work, and the worker or the link is replaced.
      LineLostError              cluster.api.line.proxy_end: the rest of a reply does not come from its replica
      WorkerGoneError            cluster.messages.membership: a worker or the controller cannot be reached
      SupersededError            cluster.messages.membership: a newer controller acts, and this one must not
      UnknownConnectionError     actors.attention.delivery: a replica's connection is not known here
      ExpertsLostError           actors.attention.lost_experts: no group that can be reached holds an expert
      ExpertsFailedError         actors.attention.lost_experts: every group that was asked failed at these rows
      ExpertNotHeldError         actors.links.protocol: rows came for an expert that the group does not hold
      LinkError                  actors.links.protocol: the peer died, hangs or broke the protocol
        GroupFailedError         … the group failed, and the link is whole
      CopyError                  actors.experts.copy_client: a peer gives no copy of an expert
      NoMemoryError              actors.experts.expert_loads: the machine has no memory for more experts

    What users of the client import from cluster.client; the server's answer, or what to do, is in the message.
      ClientError                all that a Client raises
        APIError                 … the server answered with an error; by its status it is one of
        BadRequestError, AuthenticationError, PermissionDeniedError, NotFoundError  …
        ConflictError, RateLimitError, ServerError, UnavailableError  …
        ConnectionFailedError    … it could not be reached
        StreamBrokenError        … a stream ended early
        OutputError              … what the model wrote is not what was asked for
        OutputCutError, OutputInvalidError  … it ended too early, or does not fit
        BatchError               … the batch cannot run; names the file and the line
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors cross Ray's actors, whatever their constructors take."""
        return _restored, (type(self), self.args), self.__dict__


def _restored(kind: type[IsothermError], args: Sequence[Any]) -> IsothermError:
    error = kind.__new__(kind, *args)
    error.args = tuple(args)  # OSError's __new__ leaves it to __init__
    return error


_GUESSES = " Some common causes include:"


def one_line(error: BaseException) -> str:
    """What an error says, in one line; the name of its class where it says nothing.

    The first line is the message, but in the report of another process, which Ray puts into one: what went wrong stands
    below indented details there. What Ray guesses about the cause of any end of a process is left out: memory comes
    first there, and who was killed or has crashed would be looked for in the wrong place.
    """
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    indented = [line[0].isspace() for line in lines]
    last = max(i for i, inner in enumerate(indented) if not inner)
    return lines[last if any(indented[:last]) else 0].partition(_GUESSES)[0].strip()


def without_class(line: str) -> str:
    """What an error of ours says that came through Ray, which puts the name of its class before it."""
    return line.partition(": ")[2] if line.startswith("isotherm.") else line


def named_line(error: BaseException) -> str:
    """One line with the name of the error's class, for a log or for another process that has no traceback."""
    name, line = type(error).__name__, one_line(error)
    return line if line == name else f"{name}: {line}"
