// The server's API: models, and answers as streams of text.

export class ApiError extends Error {
  constructor(message, { status = 0, code = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let key = sessionStorage.getItem("llmkit.key") ?? "";

export const getKey = () => key;

export function setKey(value) {
  key = value;
  sessionStorage.setItem("llmkit.key", value);
}

/** A response of the server. Throws ApiError in the server's own words, or the signal's AbortError. */
async function request(path, { body, signal } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch { /* a proxy's page, not the server's envelope */ }
  const wait = response.headers.get("Retry-After");
  const message = error.message ?? `The server answered ${response.status} ${response.statusText}.`;
  return new ApiError(wait ? `${message} Try again in ${wait} s.` : message, { status: response.status, code: error.code });
}

/** The models that are served: [{id, has_chat_template, max_model_len}, …]. */
export async function listModels() {
  return (await (await request("v1/models")).json()).data;
}

/** Answer a conversation: yields {text} and at the end {finish}. */
export function streamChat(body, signal) {
  return stream("v1/chat/completions", body, signal, (choice) => choice.delta?.content);
}

/** Continue a text: yields {text} and at the end {finish}. */
export function streamCompletion(body, signal) {
  return stream("v1/completions", body, signal, (choice) => choice.text);
}

async function* stream(path, body, signal, textOf) {
  const response = await request(path, { body: { ...body, stream: true }, signal });
  let finish = null;
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") break;
    const value = JSON.parse(data);
    if (value.error) throw new ApiError(value.error.message, { code: value.error.code });
    for (const choice of value.choices ?? []) {
      const text = textOf(choice);
      if (text) yield { text };
      finish = choice.finish_reason ?? finish;
    }
  }
  if (!finish) throw new ApiError("The connection ended in the middle of the answer.");
  yield { finish };
}

/** The data of server-sent events in a stream of bytes, whatever the pieces in which they come. */
export async function* events(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim(); // the API's events have one line each
      }
    }
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The connection was lost in the middle of the answer.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
