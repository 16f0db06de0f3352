// The page's side of the chat.
//
// Rules:
// - what others wrote becomes text, never HTML.
// - one socket at a time: a new room or name is a new socket, and an old one's events mean nothing.
// - a socket that is lost is opened again, sooner at first, later and later then; one that was refused is not.

"use strict";

const REFUSED = 4000;
const ROOMS = ["lobby", "random", "help"];
const MAX_LINES = 500;
const MAX_DELAY = 8000;

const byId = (id) => document.getElementById(id);
const log = byId("log");

let socket = null;
let me = null;
let here = new Map(); // who is here: their channel and their name
let delay = 0;
let timer = 0;
let shown = ""; // the room whose messages are on the page
let name = recall() || `guest-${Math.floor(Math.random() * 9000 + 1000)}`;

// The socket

function connect() {
  clearTimeout(timer);
  if (socket) socket.close();
  const room = roomInAddress();
  if (room !== shown) {
    shown = room;
    log.replaceChildren();
  }
  showRooms(room);
  byId("name").value = name;
  setMembers([]);
  setStatus("connecting", "Connecting…");
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
  socket = null;
  setMembers([]);
  if (event.code === REFUSED) {
    setStatus("disconnected", "Not connected");
    setNotice(event.reason);
    return;
  }
  delay = Math.min(MAX_DELAY, delay ? delay * 2 : 500);
  setStatus("disconnected", `Disconnected – trying again in ${Math.ceil(delay / 1000)} s`);
  timer = setTimeout(connect, delay);
}

function receive(message) {
  switch (message.type) {
    case "welcome":
      me = message.id;
      delay = 0;
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
      addEvent(missed(message.missed), "missed");
      break;
    case "roll_call":
      // Who came and went in a gap is unknown: all who are here answer now.
      setMembers([...here].filter(([id]) => id === me));
      break;
    case "error":
      setNotice(message.text);
      break;
    case "statistics":
      setStatistics(message.values);
      break;
  }
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

function setNotice(text) {
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
  add(line);
}

function addEvent(text, kind = "") {
  add(element("li", `event ${kind}`, text));
}

function add(line) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  log.append(line);
  while (log.childElementCount > MAX_LINES) log.firstElementChild.remove();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function showRooms(current) {
  const rooms = ROOMS.includes(current) ? ROOMS : [...ROOMS, current];
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

function remember() {
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
  socket.send(JSON.stringify({ type: "say", text }));
  byId("text").value = "";
  setNotice("");
});

byId("room-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const room = byId("room").value.trim();
  if (!room) return;
  byId("room").value = "";
  location.hash = encodeURIComponent(room);
  byId("text").focus();
});

byId("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  name = byId("name").value.trim();
  remember();
  delay = 0;
  connect();
  byId("text").focus();
});

addEventListener("hashchange", () => {
  delay = 0;
  setNotice("");
  connect();
});

addEventListener("online", () => {
  if (!socket) connect();
});

connect();
