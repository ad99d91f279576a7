// Asks the server, and reads an answer while it is made.

/** A request that failed, in words for the reader. */
class Failure extends Error {
  /** @param {number?} status of HTTP; null where there was no answer, or it broke off. */
  constructor(message, status = null) {
    super(message);
    this.status = status;
  }
}

/** Send a request; a status other than 2xx is a Failure. */
async function sent(path, key, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server does not answer. Is it still running?");
  }
  if (!response.ok) throw await failureOf(response);
  return response;
}

async function failureOf(response) {
  const text = await response.text().catch(() => "");
  let message = text.slice(0, 500) || response.statusText || "no reason given";
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // Something between page and server may have answered in its own words.
  }
  const seconds = response.headers.get("Retry-After");
  const when = seconds ? ` (try again in ${seconds} s)` : "";
  return new Failure(`HTTP ${response.status}: ${message}${when}`, response.status);
}

/** The data of every event of a stream of server-sent events. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((one) => one.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * The chunks of an answer.
 * @throws {Failure} the server refused or failed, or the answer broke off.
 * @throws {DOMException} AbortError: `signal` stopped it.
 */
async function* chunksOf(question, key, signal) {
  const response = await sent("v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(question),
    signal,
  });
  const lost = new Failure("The connection was lost before the answer ended. What came is kept.");
  try {
    for await (const data of eventsOf(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Failure(`The server failed: ${chunk.error.message}`);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof Failure || error.name === "AbortError") throw error;
    throw lost;
  }
  throw lost;
}
