// The page's side of the chat.
//
// Rules:
// - what others wrote becomes text, never HTML.
// - one socket at a time: a new room or name is a new socket, and an old one's events mean nothing. The server is asked first
//   whether it would let us in, so a wrong one changes nothing.
// - a socket that is lost is opened again, sooner at first, later and later then; one that was refused is not.
// - what was typed is lost by nothing: what the server does not confirm comes back.
// - whoever reads the end of the log goes on doing so, whatever grows or shrinks.

"use strict";

const REFUSED = 4000;
const ROOMS = ["lobby", "random", "help"];
const MAX_LINES = 500;
const MAX_DELAY = 8000;
const SLOW = 2000;
const CLOSE = 6; // lines

const byId = (id) => document.getElementById(id);
const log = byId("log");

let socket = null;
let entered = false; // whether the socket's server has welcomed us
let me = null;
let here = new Map(); // who is here: their channel and their name
let delay = 0;
let timer = 0;
let shown = ""; // the room whose messages are on the page
let asked = new Map(); // what the server has not answered yet: the text of a message, or null for a visit
let asking = 0;
let isOutage = false; // whether the notice is about the server that ours cannot reach
let atEnd = true; // whether the end of the log is read
let height = 0; // of the log, when its end was last shown
const guest = `guest-${Math.floor(Math.random() * 9000 + 1000)}`;
let visit = { room: roomInAddress(), name: recall() || guest };

// The socket

function connect() {
  clearTimeout(timer);
  if (socket) socket.close();
  entered = false;
  giveBackUnanswered();
  const { room, name } = visit;
  if (room !== shown) {
    shown = room;
    log.replaceChildren();
  }
  showRooms(room);
  byId("name").value = name;
  setMembers([]);
  setStatus("connecting", "Connecting…");
  timer = setTimeout(() => setStatus("connecting", "Connecting… the chat is slow to answer"), SLOW);
  const address = new URL("ws", location.href);
  address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  address.hash = "";
  address.search = new URLSearchParams({ room, name }).toString();
  const opened = (socket = new WebSocket(address));
  opened.onmessage = (event) => {
    if (opened === socket) receive(JSON.parse(event.data));
  };
  opened.onclose = (event) => {
    if (opened === socket) closed(event);
  };
}

function closed(event) {
  clearTimeout(timer);
  socket = null;
  entered = false;
  setMembers([]);
  if (event.reason) setNotice(event.reason);
  giveBackUnanswered();
  if (event.code === REFUSED) {
    setStatus("disconnected", "Not connected");
    return;
  }
  delay = Math.min(MAX_DELAY, delay ? delay * 2 : 500);
  setStatus("disconnected", `Disconnected – trying again in ${Math.ceil(delay / 1000)} s`);
  timer = setTimeout(connect, delay);
}

function ask(request, text) {
  asked.set(++asking, text);
  socket.send(JSON.stringify({ ...request, ref: asking }));
}

// Go to a room, under a name, if we would be let in; where nobody can be asked, try.
function change(room, name) {
  if (entered) ask({ type: "visit", room, name }, null);
  else go(room, name);
}

function go(room, name) {
  visit = { room, name };
  if (roomInAddress() !== room) location.hash = encodeURIComponent(room);
  byId("room").value = "";
  delay = 0;
  setNotice("");
  connect();
}

function receive(message) {
  switch (message.type) {
    case "welcome":
      clearTimeout(timer);
      entered = true;
      me = message.id;
      delay = 0;
      if (message.name !== guest) remember(message.name);
      setNotice("");
      setMembers([[me, message.name]]);
      setStatus("connected", `Connected to ${message.room}`);
      addEvent(`You are in ${message.room} as ${message.name}`);
      break;
    case "said":
      addSaid(message);
      break;
    case "joined":
      addEvent(`${message.name} joined`);
      setMembers([...here, [message.id, message.name]]);
      break;
    case "here":
    case "who":
      setMembers([...here, [message.id, message.name]]);
      break;
    case "left":
      addEvent(`${message.name} left`);
      setMembers([...here].filter(([id]) => id !== message.id));
      break;
    case "channel_layer.gap":
      addGap(message.missed);
      break;
    case "roll_call":
      // Who came and went in a gap is unknown: all who are here answer now.
      setMembers([...here].filter(([id]) => id === me));
      break;
    case "sent":
      asked.delete(message.ref);
      break;
    case "visit":
      asked.delete(message.ref);
      go(message.room, message.name);
      break;
    case "error":
      setNotice(message.text, message.away);
      refused(message.ref);
      break;
    case "away":
      setNotice(message.text, true);
      break;
    case "back":
      if (isOutage) setNotice("");
      break;
    case "statistics":
      setStatistics(message.values);
      byId("hint").hidden = here.size !== 1 || message.here > 1;
      break;
  }
}

function refused(ref) {
  const text = asked.get(ref);
  asked.delete(ref);
  if (text === null) history.replaceState(null, "", `#${encodeURIComponent(visit.room)}`);
  else if (text !== undefined) giveBack(text);
}

// Put back what was not sent, but not in the way of what is being typed.
function giveBack(text) {
  const box = byId("text");
  if (box.value === "") box.value = text;
  else addEvent(`Not sent: ${text}`, "missed");
}

function giveBackUnanswered() {
  const texts = [...asked.values()].filter((text) => text !== null);
  asked.clear();
  if (texts.length) setNotice("The connection was lost: say that again if it does not show.");
  texts.forEach(giveBack);
}

function missed(count) {
  if (count === null) return "Some messages missed";
  return count === 1 ? "1 message missed" : `${count} messages missed`;
}

// The page

function setStatus(state, text) {
  byId("status").dataset.state = state;
  byId("status").textContent = text;
}

function setNotice(text, outage = false) {
  isOutage = outage;
  byId("notice").textContent = text;
}

function setMembers(members) {
  here = new Map(members);
  const sorted = [...here].sort((one, other) => one[1].localeCompare(other[1]));
  byId("here").replaceChildren(
    ...sorted.map(([id, member]) => {
      const item = element("li", id === me ? "me" : "", member);
      item.title = member;
      return item;
    }),
  );
  byId("count").textContent = here.size;
  if (here.size !== 1) byId("hint").hidden = true;
}

function setStatistics(values) {
  byId("statistics").replaceChildren(
    ...Object.entries(values).flatMap(([field, value]) => {
      const number = element("dd", "", value.toLocaleString());
      number.dataset.field = field;
      return [element("dt", "", field.replaceAll("_", " ")), number];
    }),
  );
}

function addSaid({ id, name: who, text, at }) {
  const line = element("li", id === me ? "said mine" : "said");
  const time = element("time", "", new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }));
  time.dateTime = new Date(at * 1000).toISOString();
  line.append(element("span", "who", who), time, element("p", "text", text));
  atEnd ||= id === me;
  add(line);
}

function addEvent(text, kind = "") {
  const line = element("li", `event ${kind}`, text);
  add(line);
  return line;
}

// The gaps of a slow reader are between single messages: those so close are one line, at the last of them.
function addGap(count) {
  const before = [...log.children].slice(-CLOSE, -1).filter((line) => line.dataset.missed).pop();
  if (before) {
    before.remove();
    count = count === null || before.dataset.missed === "some" ? null : count + Number(before.dataset.missed);
  }
  addEvent(missed(count), "missed").dataset.missed = count ?? "some";
}

function add(line) {
  log.append(line);
  while (log.childElementCount > MAX_LINES) log.firstElementChild.remove();
  showEnd();
}

function showEnd() {
  height = log.clientHeight;
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function showRooms(current) {
  const rooms = ROOMS.includes(current) ? ROOMS : [...ROOMS, current];
  byId("second").href = `#${encodeURIComponent(current)}`;
  byId("rooms").replaceChildren(
    ...rooms.map((room) => {
      const link = element("a", "", room);
      link.href = `#${encodeURIComponent(room)}`;
      if (room === current) link.setAttribute("aria-current", "page");
      return link;
    }),
  );
}

function element(tag, kind, text = "") {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  made.textContent = text;
  return made;
}

// Where things are kept: the room in the address, so that it can be shared, the name in the browser

function roomInAddress() {
  try {
    return decodeURIComponent(location.hash.slice(1)) || ROOMS[0];
  } catch {
    return location.hash.slice(1);
  }
}

function recall() {
  try {
    return localStorage.getItem("name");
  } catch {
    return null; // storage is switched off
  }
}

function remember(name) {
  try {
    localStorage.setItem("name", name);
  } catch {
    // storage is switched off
  }
}

// What the visitor does

byId("say-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("text").value.trim();
  if (!text) return;
  if (!socket || socket.readyState !== WebSocket.OPEN) {
    setNotice("Not connected: the message was not sent.");
    return;
  }
  ask({ type: "say", text }, text);
  byId("text").value = "";
  setNotice("");
});

byId("room-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const room = byId("room").value.trim();
  if (!room) return;
  change(room, visit.name);
  byId("text").focus();
});

byId("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  change(visit.room, byId("name").value.trim());
  byId("text").focus();
});

addEventListener("hashchange", () => {
  if (roomInAddress() !== visit.room) change(roomInAddress(), visit.name);
});

addEventListener("online", () => {
  if (!socket) connect();
});

log.addEventListener("scroll", () => {
  // A log that has shrunk has its end hidden, though nobody scrolled.
  if (log.clientHeight === height) atEnd = log.scrollHeight - log.scrollTop - height < 60;
});

new ResizeObserver(showEnd).observe(log);

const narrow = matchMedia("(max-width: 44rem)"); // as in the style sheet
const fold = () => {
  byId("statistics-fold").open = !narrow.matches;
};
narrow.addEventListener("change", fold);
fold();

connect();
