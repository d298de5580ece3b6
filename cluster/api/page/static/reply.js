// One streamed reply: read from the server, put together, and timed.

import { ApiError, events, request } from "./api.js";

// Changes `message` (content, reasoning, tool_calls, usage, timing, finish, error) as the reply comes, and calls
// `grown` after each change. Never raises: what went wrong is in the message.
export async function streamReply(body, message, grown, signal) {
  const begin = performance.now();
  const times = { first: null, last: null };
  message.timing = {};
  try {
    const options = { include_usage: true, include_timings: true };
    const response = await request("/v1/chat/completions", {
      method: "POST", body: { ...body, stream: true, stream_options: options }, signal,
    });
    let whole = false;
    for await (const event of events(response)) {
      if (event.data === "[DONE]") {
        whole = true;
        break;
      }
      const chunk = JSON.parse(event.data);
      if (chunk.error) throw new ApiError(0, chunk.error.message ?? "the server reported an error");
      if (takeChunk(chunk, message)) {
        times.last = performance.now();
        times.first ??= times.last;
      }
      time(message, begin, times);
      grown();
    }
    if (!whole) throw new ApiError(0, "the reply broke off before its end");
  } catch (error) {
    if (error.name === "AbortError") message.finish = "stopped";
    else message.error = error instanceof ApiError ? error.message : `the reply cannot be read: ${error.message}`;
  }
  time(message, begin, times);
  grown();
}

// Whether something was said.
function takeChunk(chunk, message) {
  if (chunk.usage) message.usage = { prompt: chunk.usage.prompt_tokens, output: chunk.usage.completion_tokens };
  if (chunk.timings) message.server = chunk.timings;
  const choice = chunk.choices?.[0];
  if (!choice) return false;
  const delta = choice.delta ?? {};
  const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
  message.content += delta.content ?? "";
  message.reasoning = (message.reasoning ?? "") + reasoning;
  for (const part of delta.tool_calls ?? []) {
    const calls = (message.tool_calls ??= []);
    const call = (calls[part.index ?? calls.length] ??= { id: "", name: "", arguments: "" });
    if (part.id) call.id = part.id;
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }
  if (choice.finish_reason) message.finish = choice.finish_reason;
  const said = Boolean(delta.content || reasoning || delta.tool_calls?.length);
  if (said) message.pieces = (message.pieces ?? 0) + 1;
  return said;
}

// Tokens are counted by the server; until it says how many they were, pieces stand for them.
function time(message, begin, { first, last }) {
  if (first === null) return;
  const tokens = message.usage?.output ?? message.pieces ?? 0;
  const span = (last - first) / 1000;
  message.timing = {
    first: (first - begin) / 1000,
    total: (last - begin) / 1000,
    rate: message.usage && span > 0.005 ? Math.max(0, tokens - 1) / span : undefined,
  };
}
