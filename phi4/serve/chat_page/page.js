// The conversation, the form that continues it, and what is said of every answer.

const KEY_NAME = "phi4-api-key";
const SETTINGS = ["temperature", "top_p", "max_tokens", "seed"];
const NEAR_END_PIXELS = 60;
/** An answer that came faster says nothing of the model's speed. */
const SHORTEST_SECONDS = 0.02;

const at = (id) => document.getElementById(id);
const log = at("log");
const hasKeyboard = matchMedia("(hover: hover)").matches;

/** Of the conversation: {role, text, element, failure}. */
const turns = [];
/** As /v1/models describes it; null until the server has said so. */
let model = null;
/** AbortController of the answer that is being made. */
let asking = null;

const key = () => sessionStorage.getItem(KEY_NAME);

function toQuestion() {
  // A phone would open its keyboard over the answer.
  if (hasKeyboard) at("question").focus();
}

function say(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

// --- The model, and the key that its server may want

/** Ask which model there is; returns whether the server said so. */
async function refresh() {
  try {
    const response = await sent("v1/models", key());
    [model] = (await response.json()).data;
  } catch (error) {
    if (error.status === 401) askForKey();
    else say(at("trouble"), error.message);
    return false;
  }
  const longest = model.max_model_len?.toLocaleString("en");
  at("model").textContent = document.title = model.id;
  at("weights").textContent = [model.root, longest && `context ${longest} tokens`]
    .filter((one) => one && one !== model.id)
    .join(", ");
  say(at("trouble"), "");
  at("key-form").hidden = true;
  return true;
}

function askForKey() {
  const wasRefused = key() !== null;
  sessionStorage.removeItem(KEY_NAME);
  at("key-note").textContent = wasRefused
    ? "The server did not take this key. Try another one."
    : "This server wants a key. It is kept until this tab is closed.";
  at("key-note").classList.toggle("refused", wasRefused);
  at("key-form").hidden = false;
  at("key").value = "";
  at("key").focus();
}

at("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY_NAME, at("key").value.trim());
  if (!(await refresh())) return;
  const last = turns.at(-1);
  if (last?.failure?.status === 401) retry(last);
  else toQuestion();
});

// --- Turns

function addTurn(role, text) {
  const element = at("turn").content.firstElementChild.cloneNode(true);
  const turn = { role, text, element, failure: null };
  element.classList.add(role);
  element.querySelector("h2").textContent = role === "user" ? "You" : model.id;
  show(element.querySelector(".text"), text);
  element.querySelector(".edit").hidden = role !== "user";
  element.querySelector(".edit").addEventListener("click", () => edit(turn));
  element.querySelector(".retry").addEventListener("click", () => retry(turn));
  element.querySelector(".copy").addEventListener("click", (event) => copy(turn, event.target));
  at("empty").hidden = true;
  turns.push(turn);
  log.append(element);
  log.scrollTop = log.scrollHeight;
  return turn;
}

/** Take a turn and all that follow it out of the conversation. */
function dropFrom(turn) {
  asking?.abort();
  asking = null;
  setBusy(false, "");
  for (const one of turns.splice(turns.indexOf(turn))) one.element.remove();
  at("empty").hidden = turns.length > 0;
}

function retry(turn) {
  dropFrom(turn);
  toQuestion();
  ask();
}

function edit(turn) {
  dropFrom(turn);
  at("question").value = turn.text;
  at("question").focus();
}

async function copy(turn, button) {
  await navigator.clipboard.writeText(turn.text);
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

// --- An answer

/** The request for the next turn, by what the settings say now. */
function question() {
  const messages = turns
    .filter((turn) => turn.text)
    .map(({ role, text }) => ({ role, content: text }));
  const system = at("system").value;
  if (system.trim()) messages.unshift({ role: "system", content: system });
  const set = SETTINGS.filter((name) => at(name).value !== "");
  return {
    model: model.id,
    messages,
    stream: true,
    stream_options: { include_usage: true },
    return_token_ids: true,
    ...Object.fromEntries(set.map((name) => [name, Number(at(name).value)])),
  };
}

/** What an answer has come to. */
class Progress {
  text = "";
  reason = null;
  #asked = performance.now();
  #first = null;
  #last = null;
  #numTokens = 0;

  take(chunk) {
    const [choice] = chunk.choices;
    // With the last chunk comes the count of the server, which knows tokens that have no text.
    if (chunk.usage) this.#numTokens = chunk.usage.completion_tokens;
    if (!choice) return;
    this.text += choice.delta.content ?? "";
    this.reason = choice.finish_reason ?? this.reason;
    const numNew = choice.token_ids?.length ?? 0;
    if (!numNew && !choice.delta.content) return;
    this.#numTokens += chunk.usage ? 0 : numNew;
    this.#last = performance.now();
    this.#first ??= this.#last;
  }

  /** Counts and times, each in words. */
  facts() {
    if (!this.#first) return [];
    const seconds = (this.#last - this.#first) / 1000;
    const count = this.#numTokens;
    const rate = ((count - 1) / seconds).toLocaleString("en", { maximumSignificantDigits: 3 });
    return [
      count > 0 && `${count} token${count === 1 ? "" : "s"}`,
      count > 1 && seconds > SHORTEST_SECONDS && `${rate} tokens/s`,
      `first after ${((this.#first - this.#asked) / 1000).toFixed(2)} s`,
    ].filter(Boolean);
  }
}

/** Ask for the assistant's next turn and show it while it is made. */
async function ask() {
  const control = (asking = new AbortController());
  const body = question();
  const turn = addTurn("assistant", "");
  const progress = new Progress();
  let frame = null;
  const draw = () => {
    cancelAnimationFrame(frame);
    frame = null;
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END_PIXELS;
    show(turn.element.querySelector(".text"), progress.text);
    turn.element.querySelector(".facts").textContent = progress.facts().join(", ");
    if (follows) log.scrollTop = log.scrollHeight;
  };
  begin(turn);
  let how = "";
  try {
    for await (const chunk of chunksOf(body, key(), control.signal)) {
      progress.take(chunk);
      turn.text = progress.text;
      name(turn, chunk.system_fingerprint);
      frame ??= requestAnimationFrame(draw);
    }
    how = progress.reason === "length" ? "cut off at the token limit" : "";
  } catch (error) {
    if (error.name === "AbortError") how = "stopped";
    else turn.failure = error;
  }
  // The turn was taken out meanwhile, and with it all that waits for its end.
  if (!turn.element.isConnected) return;
  draw();
  end(turn, [...progress.facts(), how].filter(Boolean).join(", "));
}

/** Say who answers: the model, and its weights, which may be others than those of the last answer. */
function name(turn, weights) {
  const names = [model.id, weights !== model.id && weights];
  turn.element.querySelector("h2").textContent = names.filter(Boolean).join(", ");
}

function begin(turn) {
  turn.element.setAttribute("aria-busy", "true");
  setBusy(true, "Answering…");
}

function end(turn, facts) {
  const { element, failure } = turn;
  element.removeAttribute("aria-busy");
  element.querySelector(".facts").textContent = facts;
  say(element.querySelector(".problem"), failure?.message ?? "");
  element.querySelector(".retry").hidden = false;
  element.querySelector(".copy").hidden = !turn.text || !navigator.clipboard;
  log.scrollTop = log.scrollHeight;
  asking = null;
  setBusy(false, failure ? "" : "The answer has ended.");
  if (failure?.status === 401) askForKey();
  else if (!failure) refresh();
}

function setBusy(isBusy, status) {
  at("send").hidden = isBusy;
  at("stop").hidden = !isBusy;
  at("status").textContent = status;
}

// --- What the reader does

/** The first setting that no request can have, shown; null where there is none. */
function wrongSetting() {
  const wrong = SETTINGS.map(at).find((input) => !input.checkValidity());
  if (!wrong) return null;
  at("settings").open = true;
  wrong.reportValidity();
  return wrong;
}

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = at("question").value;
  if (asking || !text.trim() || wrongSetting()) return;
  if (!model && !(await refresh())) return;
  // While the server said which model it has, the form may have been sent again.
  if (asking) return;
  at("question").value = "";
  addTurn("user", text);
  ask();
});

at("question").addEventListener("keydown", (event) => {
  const isSend = event.key === "Enter" && !event.shiftKey && !event.isComposing;
  if (!isSend || !hasKeyboard) return;
  event.preventDefault();
  at("ask").requestSubmit();
});

at("stop").addEventListener("click", () => {
  asking?.abort();
  toQuestion();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") asking?.abort();
});

at("new").addEventListener("click", () => {
  if (turns.length) dropFrom(turns[0]);
  at("question").focus();
});

at("settings").open = matchMedia("(min-width: 55rem)").matches;
if (!hasKeyboard) at("question").placeholder = "";
toQuestion();
refresh();
