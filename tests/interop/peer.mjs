// A small peer of Gossamer in JavaScript, as an example for those who write one in another language. It was written
// from docs/protocol.md and docs/swarms.md alone. No part of the node uses it.
//
//     node peer.mjs INVITE [SEED]             dial the invite's first node
//     node peer.mjs MANIFEST SEED HOST:PORT   listen there for the swarm of this file, and dial nobody unasked
//
// SEED is the peer's private key in 64 hex digits; without it one is drawn at random. The peer takes every item, relays
// it to its other peers, and prints what happens as lines of JSON. It obeys lines on its standard input:
//
//     dial ADDRESS           dial another node, if we listen
//     publish FILE [TOPIC]   sign the file's bytes as an item and offer it; TOPIC has 16 hex digits
//     send HEX               send these bytes to the first peer as they are
//     receive HEX            treat these bytes as if that peer had sent them
//
// It leaves out what a peer may: it announces an item only once it has all of it. It learns no addresses
// and answers no DIAL_BACK: it believes the command line that it can be dialled there. It obeys no revocation list and
// keeps no score of its peers. It forgets the uses of invites when it ends.

import crypto from "node:crypto";
import fs from "node:fs";
import net from "node:net";
import readline from "node:readline";
import { decode, encode } from "@msgpack/msgpack";
import { decompress } from "fzstd";
import { Dealer } from "zeromq";
import { listen } from "./listener.mjs";

// docs/protocol.md#kinds
const HELLO = 1, PEERS = 2, PING = 3, PONG = 4, HAVE = 5, WANT = 6, ITEM = 7, DONT_HAVE = 8, BUSY = 9, CANCEL = 10;
const GOODBYE = 11, DIGEST = 12, INTEREST = 13, ASK_MANIFEST = 14, MANIFEST = 15;
const REVOCATIONS = 17, OUTLINE = 18, CHUNK = 19, ACK = 20;

const VERSION = 0x0400; // major x 256 + minor
const HEAD_BYTES = 168; // of an envelope, before its body
const MAX_FRAME_BYTES = HEAD_BYTES + 192 * 1024, MAX_ARRAYS = 1024; // of a message
const CHUNK_BYTES = 128 * 1024, MAX_INDICES = 16; // that a WANT may name
const MAX_IDS = 512, MAX_RECORDS = 64; // in a message
const MAX_ITEM_BYTES = 16 * 1024 * 1024; // unpacked, until the manifest says otherwise
const TICK_MS = 1000, HELLO_MS = 2000, QUIET_MS = 5000, PING_MS = 3000, SILENT_MS = 56_000;
const SILENT_HOLDER_MS = 4000, BUSY_MS = 2000; // until we ask again
const RECORD_LIFE_MS = 24 * 3600 * 1000, MAX_RECORD_LIFE_MS = 7 * RECORD_LIFE_MS;
const MAX_AGE_MS = 3600 * 1000, MAX_AHEAD_MS = 600 * 1000;
const NO_TOPIC = Buffer.alloc(8);

// What we keep, and for whom.
const MAX_HELD_BYTES = 256 * 1024 * 1024, MAX_WANTS = 1024, MAX_COMING_BYTES = 256 * 1024 * 1024;
const DIALLED_PLACES = 11, HOME_PLACES = 256; // for callers that can be dialled, and that cannot
const MAX_WAITING_BYTES = 256 * 1024, MAX_OWED = 2048; // of a link: small messages, and items or chunks
const QUOTA_S = 1, QUOTA_RATE = 0.1; // processor time for all peers of a network: at once, and in a second

const say = (event, more = {}) => console.log(JSON.stringify({ event, ...more }));
const check = (holds, what) => { if (!holds) throw new Error(what); };

// Bytes. Integers outside MessagePack are big-endian.
const uint = (bytes) => (value) => Buffer.from(BigInt(value).toString(16).padStart(2 * bytes, "0"), "hex");
const u16 = uint(2), u32 = uint(4), u64 = uint(8);
const sha256 = (...parts) => crypto.createHash("sha256").update(Buffer.concat(parts)).digest();
const cut = (bytes, width) =>
  Array.from({ length: Math.ceil(bytes.length / width) }, (_, i) => bytes.subarray(i * width, (i + 1) * width));

// Item ids, in messages joined and here in hex.
const split = (joined) => cut(joined, 32).map((id) => id.toString("hex"));
const join = (ids) => Buffer.concat(ids.map((id) => Buffer.from(id, "hex")));

// MessagePack. JavaScript's numbers are exact below 2^53 only, so 64-bit integers have to be written as BigInt here.
const pack = (fields) => Buffer.from(encode(fields, { useBigInt64: true }));
const BOUNDS = { useBigInt64: true, maxMapLength: 0, maxExtLength: 0, maxArrayLength: MAX_ARRAYS };
const countArrays = (value) =>
  Array.isArray(value) ? value.reduce((sum, element) => sum + countArrays(element), 1) : 0;

function unpack(bytes) {
  const fields = decode(bytes, BOUNDS);
  check(Array.isArray(fields) && countArrays(fields) <= MAX_ARRAYS, "malformed");
  return fields;
}

// Keys: docs/protocol.md#keys. node:crypto takes raw keys in their DER frames only.
const DER = { ed25519: "302e020100300506032b657004220420", x25519: "302e020100300506032b656e04220420" };
const privateKey = (kind, raw) =>
  crypto.createPrivateKey({ key: Buffer.concat([Buffer.from(DER[kind], "hex"), raw]), format: "der", type: "pkcs8" });
const rawPublic = (key) => crypto.createPublicKey(key).export({ format: "der", type: "spki" }).subarray(-32);
const BASE32 = "abcdefghijklmnopqrstuvwxyz234567";
const nodeId = (publicKey) => cut(sha256(publicKey).subarray(0, 20), 5).map((five) => {
  const value = BigInt("0x" + five.toString("hex"));
  return [7n, 6n, 5n, 4n, 3n, 2n, 1n, 0n].map((place) => BASE32[Number((value >> (5n * place)) & 31n)]).join("");
}).join("");
const domain = (text) => Buffer.from(text + "\0");

class Identity {
  constructor(seed) {
    this.key = privateKey("ed25519", seed);
    this.publicKey = rawPublic(this.key);
    this.curveSecret = Buffer.from(crypto.hkdfSync("sha256", seed, "", "gossamer/curve/1", 32));
    this.curveKey = rawPublic(privateKey("x25519", this.curveSecret));
  }

  sign(...parts) { return crypto.sign(null, Buffer.concat(parts), this.key); }
}

// The points of small order: anybody can sign as such a key. The highest bit is the sign of x, which does not matter.
const SMALL_ORDER = new Set([
  "00".repeat(32), "01" + "00".repeat(31), "ec" + "ff".repeat(30) + "7f",
  "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
  "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
]);

// A point is refused if it has small order, or if its y is not below 2^255 - 19, which is not canonical. libsodium
// refuses these, as Gossamer does; OpenSSL takes them. It refuses an S that is not canonical.
function isRefused(point) {
  const bytes = Buffer.from(point);
  bytes[31] &= 0x7f;
  const isCanonical = bytes[0] < 0xed || bytes[31] < 0x7f || bytes.subarray(1, 31).some((byte) => byte < 0xff);
  return !isCanonical || SMALL_ORDER.has(bytes.toString("hex"));
}

function isSigned(publicKey, signature, ...parts) {
  if (isRefused(publicKey) || isRefused(signature.subarray(0, 32))) return false;
  const key = Buffer.concat([Buffer.from("302a300506032b6570032100", "hex"), publicKey]);
  return crypto.verify(null, Buffer.concat(parts), { key, format: "der", type: "spki" }, signature);
}

// ZeroMQ wants CURVE keys in Z85 (rfc.zeromq.org/spec/32).
const Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#";
const z85 = (key) => cut(key, 4).map((four) => {
  const value = four.readUInt32BE();
  return [4, 3, 2, 1, 0].map((power) => Z85[Math.floor(value / 85 ** power) % 85]).join("");
}).join("");

// Envelopes: docs/protocol.md#envelope.
const chunksOf = (body) => (body.length ? cut(body, CHUNK_BYTES) : [body]);
const hashesOf = (body) => Buffer.concat(chunksOf(body).map((chunk) => sha256(chunk)));
let sequence = 0;

function seal(identity, swarm, kind, body) {
  const digest = sha256(hashesOf(body));
  const header = [u16(VERSION), u16(kind), swarm, u64(++sequence), u64(Date.now()), u32(body.length), digest];
  const signature = identity.sign(domain("gossamer/envelope/3"), ...header);
  return Buffer.concat([identity.publicKey, signature, ...header, body]);
}

function openHead(head, swarm) {
  check(head.length === HEAD_BYTES, "malformed");
  check(head[96] === VERSION >> 8, "other version");
  const signer = head.subarray(0, 32);
  check(isSigned(signer, head.subarray(32, 96), domain("gossamer/envelope/3"), head.subarray(96)), "forged");
  check(head.subarray(100, 116).equals(swarm), "another swarm");
  const digest = head.subarray(136);
  return {
    signer, digest, id: sha256(signer, digest).toString("hex"),
    kind: head.readUInt16BE(98), time: Number(head.readBigUInt64BE(124)), size: head.readUInt32BE(132),
  };
}

function open(frame, swarm) {
  const body = frame.subarray(HEAD_BYTES);
  check(frame.length >= HEAD_BYTES && body.length === frame.readUInt32BE(132), "malformed");
  const head = openHead(frame.subarray(0, HEAD_BYTES), swarm);
  check(sha256(hashesOf(body)).equals(head.digest), "forged");
  return { ...head, body };
}

// Control frames: docs/protocol.md#control-frame.
const MAGIC = Buffer.from("gossamer");
const control = (kind, body) => Buffer.concat([MAGIC, u16(kind), body]);
const isControl = (frame) => frame.subarray(0, 8).equals(MAGIC);

// What we read of frames that have been checked.
const idOf = (frame) => sha256(frame.subarray(0, 32), frame.subarray(136, HEAD_BYTES)).toString("hex");
const timeOf = (frame) => Number(frame.readBigUInt64BE(124));
const topicOf = (frame) => frame.subarray(HEAD_BYTES, HEAD_BYTES + 8);
const digestEntry = (record) =>
  Buffer.concat([sha256(record.subarray(0, 32)).subarray(0, 8), sha256(record).subarray(0, 8)]).toString("hex");

// The size that a Zstandard frame states (RFC 8878, 3.1.1.1); an item's content has to state it.
function statedSize(frame) {
  check(frame.length > 6 && frame.readUInt32LE(0) === 0xfd2fb528, "malformed");
  const isSingle = (frame[4] >> 5) & 1;
  const bytes = [isSingle, 2, 4, 8][frame[4] >> 6];
  check(bytes && !(frame[4] & 3), "malformed"); // no size, or a dictionary
  const stated = frame.subarray(isSingle ? 5 : 6).subarray(0, bytes);
  check(stated.length === bytes, "malformed");
  return Number(BigInt("0x" + Buffer.from(stated).reverse().toString("hex"))) + (bytes === 2 ? 256 : 0);
}

// Invites: docs/swarms.md#invite.
function parseInvite(text) {
  const line = text.trim().slice(0, -5);
  check(sha256(Buffer.from(line)).subarray(0, 3).toString("base64url") === text.trim().slice(-4), "malformed");
  const [name, manifest, seeds, grant] = line.replace("gossamer://", "").split("/");
  const [key, endpoint] = seeds.split(",")[0].split("@");
  const hash = Buffer.from(manifest, "base64url");
  const [kind, fields] = grant ? unpack(Buffer.from(grant, "base64url")) : [];
  return {
    name, hash, swarm: hash.subarray(0, 16), kind, fields, uses: kind === 3 ? fields[1] : 1,
    seed: { key: Buffer.from(key, "base64url"), endpoint: `tcp://${endpoint}` },
  };
}

// The grant of our record: none, the invite's pass, or a ticket of the invite key (docs/swarms.md#who-is-admitted).
function grantOf({ kind, fields, swarm }, identity) {
  if (kind !== 3) return kind ? pack([kind, fields]) : Buffer.alloc(0);
  const [seed, uses, expiry, signature] = fields;
  const key = new Identity(seed);
  const use = key.sign(domain("gossamer/ticket/1"), swarm, identity.publicKey);
  return pack([2, [key.publicKey, uses, expiry, signature, use]]);
}

// Manifest: docs/swarms.md#manifest.
function openManifest(bytes) {
  const founder = bytes.subarray(0, 32), payload = bytes.subarray(96), hash = sha256(bytes);
  check(bytes.length <= 32 * 1024, "oversized");
  check(isSigned(founder, bytes.subarray(32, 96), domain("gossamer/manifest/1"), payload), "forged");
  const [, name, , , policy, allowed, , [limit]] = unpack(payload);
  return {
    bytes, founder, name, swarm: hash.subarray(0, 16), limit: Number(limit), isOpen: policy === "open",
    ids: new Set(cut(allowed, 20).map((id) => id.toString("hex"))), // who is allowed
  };
}

// Why a node is not admitted, or nothing (docs/swarms.md#who-is-admitted). `uses` tells who has used which
// invite.
function whyNotAdmitted({ isOpen, founder, ids, swarm }, uses, publicKey, grant) {
  const id = sha256(publicKey).subarray(0, 20), node = id.toString("hex");
  if (isOpen || publicKey.equals(founder) || ids.has(node)) return "";
  const [kind, fields] = grant.length ? unpack(grant) : [];
  if (kind === 1) {
    const [expiry, signature] = fields;
    if (!isSigned(founder, signature, domain("gossamer/pass/1"), swarm, id, u64(expiry))) return "not_admitted";
    return expiry > Date.now() ? "" : "invite_expired";
  }
  if (kind !== 2) return "not_admitted";
  const [key, count, expiry, signature, use] = fields;
  const isGranted = isSigned(founder, signature, domain("gossamer/invite/1"), swarm, key, u32(count), u64(expiry));
  const isUsed = isGranted && isSigned(key, use, domain("gossamer/ticket/1"), swarm, publicKey);
  if (!isUsed || count > 4096) return "not_admitted";
  if (expiry <= Date.now()) return "invite_expired";
  const holders = uses.get(key.toString("hex")) ?? new Set();
  if (holders.has(node)) return "";
  if (holders.size >= count) return "invite_used";
  uses.set(key.toString("hex"), holders.add(node));
  return "";
}

// Addresses: of this machine, of its private network, or public. IPv4 may be written as IPv6.
const LOOPBACK = 0, PRIVATE = 1, PUBLIC = 2;
const SUBNETS = [
  ["127.0.0.0", 8, LOOPBACK], ["::1", 128, LOOPBACK], ["10.0.0.0", 8, PRIVATE], ["172.16.0.0", 12, PRIVATE],
  ["192.168.0.0", 16, PRIVATE], ["169.254.0.0", 16, PRIVATE], ["fc00::", 7, PRIVATE], ["fe80::", 10, PRIVATE],
].map(([start, bits, scope]) => {
  const list = new net.BlockList();
  list.addSubnet(start, bits, `ipv${net.isIP(start)}`);
  return { list, scope };
});
const hostOf = (endpoint) => new URL(endpoint).hostname.replace(/[[\]]/g, "");
const plain = (address) => address.replace(/^::ffff:(?=\d+\.)/, "");

function scopeOf(address) { // a name counts as public
  const family = net.isIP(address);
  return (family && SUBNETS.find(({ list }) => list.check(address, `ipv${family}`))?.scope) ?? PUBLIC;
}

// A /24 of IPv4, a /48 of IPv6, or one private address (docs/protocol.md#words).
function networkOf(address) {
  if (scopeOf(address) < PUBLIC) return address;
  if (net.isIP(address) === 4) return address.split(".").slice(0, 3).join(".");
  const [before, after] = address.split("::").map((half) => half.split(":"));
  const zeros = after ? Array(8 - before.length - after.length).fill("0") : [];
  return [...before, ...zeros, ...(after ?? [])].slice(0, 3).join(":");
}

// docs/protocol.md#the-life-of-a-link. Who has used up what its network may cost waits here, and its frames in its connection.
class Quota {
  constructor() { this.accounts = new Map(); }

  leftOf(network, now = Date.now()) {
    const { left, at } = this.accounts.get(network) ?? { left: QUOTA_S, at: now };
    return Math.min(QUOTA_S, left + ((now - at) / 1000) * QUOTA_RATE);
  }

  async pay(network, seconds) {
    const left = this.leftOf(network) - seconds;
    this.accounts.set(network, { left, at: Date.now() });
    if (left < 0) await new Promise((resolve) => setTimeout(resolve, (-left / QUOTA_RATE) * 1000));
  }

  forgetFull() {
    for (const network of this.accounts.keys())
      if (this.leftOf(network) === QUOTA_S) this.accounts.delete(network);
  }
}

// A connection to a peer, which we dialled or which called us (listener.mjs).
class Link {
  constructor(peer, socket, { address, caller = null, key = null }) {
    Object.assign(this, { peer, socket, caller, key, address });
    this.network = networkOf(address);
    this.isSurplus = false; // another link with its node stays
    this.isAdmitted = this.isLive = this.isClosed = this.isGreeting = false;
    this.node = this.record = null; // its public key in hex; its record
    this.topics = null; // of interest, as a set of hex; null: all
    this.waiting = []; // small messages
    this.waitingBytes = 0;
    this.owed = new Map(); // what it asked for, in order: { id, index } under a name
    this.heardAt = this.pingedAt = this.greetedAt = Date.now();
  }

  get curveKey() { return this.caller ? this.caller.key : this.key; } // that the connection has proved

  async run() {
    for await (const parts of this.socket) {
      const frame = Buffer.concat(parts);
      this.heardAt = Date.now();
      if (!this.isAnswer(frame)) await this.peer.quota.pay(this.payer, this.cost(frame));
      this.receive(frame);
    }
  }

  get isOpen() { return this.isLive && !this.isSurplus; }

  get payer() { return (this.isLive ? "" : "stranger ") + this.network; } // strangers do not use up a peer's quota

  isAnswer(frame) { // to a WANT of ours
    const isChunk = isControl(frame) && frame.readUInt16BE(8) === CHUNK;
    const isItem = !isControl(frame) && frame.length > HEAD_BYTES && frame.readUInt16BE(98) === ITEM;
    if (!isChunk && !isItem) return false;
    const id = isChunk ? frame.toString("hex", 10, 42) : idOf(frame);
    return this.peer.wants.get(id)?.asked === this;
  }

  cost(frame) {
    const kind = frame.length < HEAD_BYTES && !isControl(frame) ? 0 : frame.readUInt16BE(isControl(frame) ? 8 : 98);
    const perByte = kind === ITEM || kind === CHUNK ? 16e-9 : 400e-9;
    return (isControl(frame) ? 200e-6 : 300e-6) + frame.length * perByte;
  }

  close(why = "") {
    if (this.isClosed) return;
    say("lost", { why });
    this.isClosed = true;
    this.isLive = false;
    this.peer.lose(this);
    if (this.caller) this.caller.close();
    else if (!this.socket.closed) this.socket.close();
  }

  greet() {
    this.greetedAt = Date.now();
    this.isGreeting = !this.caller;
    this.send(this.peer.hello());
  }

  turnAway(reason) {
    say("turned away", { reason });
    this.tell(GOODBYE, reason);
    setTimeout(() => this.close(), HELLO_MS);
  }

  tell(kind, ...fields) { this.send(control(kind, pack(fields))); }

  send(frame) {
    this.waiting.push(frame);
    this.waitingBytes += frame.length;
    if (this.waitingBytes > MAX_WAITING_BYTES) this.close(); // it does not read
    else this.pump();
  }

  // Send one frame after the other: small messages first, then what is owed.
  async pump() {
    if (this.isPumping) return;
    this.isPumping = true;
    try {
      for (let frame; (frame = this.next()); ) await this.socket.send(frame);
    } catch {} // the connection has ended
    this.isPumping = false;
  }

  next() {
    const message = this.waiting.shift();
    if (message) {
      this.waitingBytes -= message.length;
      return message;
    }
    for (const [name, { id, index }] of this.owed) {
      this.owed.delete(name);
      return this.peer.answer(id, index);
    }
  }

  tick(now) {
    if (this.isGreeting && now - this.greetedAt >= HELLO_MS) this.greet();
    if (!this.isLive) return;
    if (now - this.heardAt > SILENT_MS) return this.close();
    if (now - this.heardAt > QUIET_MS && now - this.pingedAt > PING_MS) {
      this.pingedAt = now;
      this.tell(PING, 0);
    }
    if (this.owed.size) this.tell(BUSY, Buffer.alloc(0)); // all that you asked for is queued here
  }

  receive(frame) {
    try {
      if (isControl(frame)) this.hear(frame.readUInt16BE(8), frame.subarray(10));
      else this.openSealed(frame);
    } catch (error) {
      say("refused", { why: error.message });
    }
  }

  openSealed(frame) {
    if (this.caller && frame.length > HEAD_BYTES && frame[96] !== VERSION >> 8) return this.refuseVersion();
    const envelope = open(frame, this.peer.swarm);
    if (envelope.kind === HELLO) this.peer.welcome(this, envelope);
    else if (envelope.kind === GOODBYE) this.leave(unpack(envelope.body)[0]);
    else if (envelope.kind === ITEM) {
      check(this.isLive, "before hello");
      this.tell(ACK, join([envelope.id]), [[]]);
      this.peer.take(envelope, frame, this);
    }
  }

  refuseVersion() {
    this.send(this.peer.seal(GOODBYE, pack([`other_version_${VERSION >> 8}_${VERSION & 255}`])));
    setTimeout(() => this.close(), HELLO_MS);
  }

  hear(kind, body) {
    if (kind === GOODBYE) return this.leave(unpack(body)[0]);
    if (kind === ASK_MANIFEST && this.isAdmitted) return this.tell(MANIFEST, this.peer.manifest.bytes);
    if (!this.isLive) return check(!this.caller || kind === REVOCATIONS, "before hello");
    if (kind === CHUNK) {
      const id = body.toString("hex", 0, 32);
      this.tell(ACK, join([id]), [[body.readUInt16BE(32)]]);
      return this.peer.takeChunk(id, body.readUInt16BE(32), body.subarray(34), this);
    }
    if (kind === PING) return this.tell(PONG, unpack(body)[0]);
    if (kind === HAVE) return this.peer.choose(this, ...unpack(body));
    if (kind === WANT) return this.owe(...unpack(body));
    if (kind === CANCEL) return this.cancel(...unpack(body));
    if (kind === OUTLINE) return this.peer.takeOutline(this, ...unpack(body));
    if (kind === DONT_HAVE) return this.peer.lack(this, split(unpack(body)[0]));
    if (kind === BUSY) return this.peer.wait(this, split(unpack(body)[0]));
    if (kind === INTEREST) return this.turnTo(...unpack(body));
    if (kind === DIGEST) return this.tellRecords(unpack(body)[0]);
    if (kind === MANIFEST) return this.peer.takeManifest(unpack(body)[0]);
    // The rest does not concern us. Kinds that we do not know are of a newer version.
  }

  leave(reason) {
    if (this.caller) return this.close();
    this.isGreeting = false;
    say("goodbye", { reason });
  }

  begin(node) {
    this.isLive = true;
    this.isGreeting = false;
    say("live", { node });
    this.tell(INTEREST, 1, Buffer.alloc(0), 0); // every topic
    this.tellRecords(Buffer.alloc(0));
    if (!this.peer.manifest) this.send(control(ASK_MANIFEST, Buffer.alloc(0)));
    this.announce([...this.peer.held.keys()]);
  }

  turnTo(all, topics) {
    this.topics = all ? null : new Set(cut(topics, 8).map((topic) => topic.toString("hex")));
  }

  // Tell the records that it lacks, of our other peers that it can dial from where it is.
  tellRecords(entries) {
    const known = new Set(cut(entries, 16).map((entry) => entry.toString("hex")));
    const scope = scopeOf(this.address);
    const isFor = (link) => link.node !== this.node && link.isOpen && link.canBeDialled && link.scope >= scope;
    const records = this.peer.links.filter(isFor).map((link) => link.record);
    const lacking = records.filter((record) => !known.has(digestEntry(record)));
    if (lacking.length) this.tell(PEERS, lacking.slice(0, MAX_RECORDS));
  }

  // docs/protocol.md#have-and-want
  announce(ids) {
    const isWanted = (id) => {
      const topic = topicOf(this.peer.held.get(id));
      return !this.topics || topic.equals(NO_TOPIC) || this.topics.has(topic.toString("hex"));
    };
    const chosen = ids.filter(isWanted);
    for (let i = 0; i < chosen.length; i += MAX_IDS) {
      const part = chosen.slice(i, i + MAX_IDS), frames = part.map((id) => this.peer.held.get(id));
      const hints = frames.map((frame) => sha256(frame.subarray(0, 32)).subarray(0, 4)); // of the signers
      const topics = Buffer.concat(frames.map(topicOf));
      this.tell(HAVE, join(part), frames.map((frame) => frame.length), topics, Buffer.concat(hints), []);
    }
  }

  // Each item that is asked for is answered: by its frame, its outline, its chunks, DONT_HAVE or BUSY. What is asked
  // for again while it waits is sent once.
  owe(ids, indices) {
    const isPoor = this.peer.quota.leftOf(this.payer) < QUOTA_S / 2;
    const lacking = [], refused = [];
    for (const [i, id] of split(ids).entries()) {
      const frame = this.peer.held.get(id);
      if (!frame) lacking.push(id);
      else if (isPoor || this.owed.size + MAX_INDICES > MAX_OWED) refused.push(id);
      else for (const index of indices[i]?.length ? indices[i].slice(0, MAX_INDICES) : [null]) {
        if (index === null || index < chunksOf(frame.subarray(HEAD_BYTES)).length)
          this.owed.set(`${id} ${index ?? ""}`, { id, index });
      }
    }
    if (lacking.length) this.tell(DONT_HAVE, join(lacking));
    if (refused.length) this.tell(BUSY, join(refused));
    this.pump();
  }

  cancel(ids, indices) {
    for (const [i, id] of split(ids).entries())
      for (const index of indices[i]?.length ? indices[i] : [""]) this.owed.delete(`${id} ${index}`);
  }
}

class Peer {
  constructor(identity, { invite, manifest, endpoint }) {
    Object.assign(this, { identity, invite, manifest, endpoint });
    this.swarm = (invite ?? manifest).swarm;
    this.limit = manifest?.limit ?? MAX_ITEM_BYTES;
    this.started = BigInt(Date.now()) << 16n;
    this.links = [];
    this.uses = new Map(); // of invites, by those who called us
    this.quota = new Quota();
    this.held = new Map(); // whole items by id in hex, oldest first: the frames as their signers made them
    this.heldBytes = 0;
    // Items that were announced and are not here, by id: the links that hold them, the one that was asked, what it was
    // asked for and has not sent, when to ask again, and what came of a large one.
    this.wants = new Map();
    setInterval(() => this.tick(Date.now()), TICK_MS);
  }

  get keys() { return { curvePublicKey: z85(this.identity.curveKey), curveSecretKey: z85(this.identity.curveSecret) }; }

  seal(kind, body) { return seal(this.identity, this.swarm, kind, body); }

  // docs/protocol.md#peer-record. Each record that we sign has a larger incarnation than the one before.
  record() {
    const grant = this.invite ? grantOf(this.invite, this.identity) : Buffer.alloc(0);
    const payload = pack([
      1, this.swarm, this.identity.curveKey, this.endpoint ? [this.endpoint] : [], this.started++, "peer.mjs",
      BigInt(Date.now() + RECORD_LIFE_MS), grant, [],
    ]);
    return Buffer.concat([this.identity.publicKey, this.identity.sign(domain("gossamer/record/1"), payload), payload]);
  }

  // We are needy (1) if we cannot be dialled, as we have no other peer then. 0: we obey no revocation list.
  hello() { return this.seal(HELLO, pack([this.record(), this.endpoint ? 0 : 1, 0])); }

  // Dial, say hello until the node says its own, and handle what it sends, until the connection ends.
  async dial({ endpoint, key }) {
    const socket = new Dealer({ ...this.keys, curveServerKey: z85(key), linger: 0, reconnectInterval: -1 });
    const link = new Link(this, socket, { address: hostOf(endpoint), key });
    socket.events.on("disconnect", () => link.close());
    socket.connect(endpoint);
    this.links.push(link);
    link.greet();
    await link.run();
  }

  async listen(endpoint) {
    const options = {
      ...this.keys, maxMessageSize: MAX_FRAME_BYTES, sendHighWaterMark: 16, receiveHighWaterMark: 16,
    };
    const port = await listen(endpoint, options, (caller) => {
      const link = new Link(this, caller.socket, { address: plain(caller.address), caller });
      this.links.push(link);
      caller.onClose = (why) => link.close(why);
      link.run().catch(() => link.close());
    });
    this.endpoint = `tcp://${endpoint.replace(/\d+$/, port)}`;
    say("listening", { address: `${this.endpoint}?key=${this.identity.curveKey.toString("hex")}` });
  }

  // The record in the HELLO binds the node's key to the CURVE key that the connection has proved.
  welcome(link, { signer, body }) {
    const [record] = unpack(body);
    check(record.subarray(0, 32).equals(signer), "hello with the record of another");
    const payload = record.subarray(96);
    check(isSigned(signer, record.subarray(32, 96), domain("gossamer/record/1"), payload), "forged");
    const [version, swarm, curveKey, endpoints, , , expiry, grant] = unpack(payload);
    check(version === 1 && this.swarm.equals(swarm), "record of another swarm");
    check(link.curveKey.equals(curveKey), "record of another connection");
    if (link.isLive) return link.caller && link.greet(); // a HELLO that was repeated
    const node = signer.toString("hex"), scope = Math.min(...endpoints.map((text) => scopeOf(hostOf(text))));
    Object.assign(link, { node, record, scope, canBeDialled: endpoints.length > 0 });
    const other = this.links.find((known) => known !== link && known.isOpen && known.node === node);
    if (link.caller) {
      if (expiry <= Date.now()) return link.turnAway("clock_behind");
      if (expiry > Date.now() + MAX_RECORD_LIFE_MS) return link.turnAway("clock_ahead");
      const why = whyNotAdmitted(this.manifest, this.uses, signer, grant);
      if (why) return link.turnAway(why);
      link.isAdmitted = true;
      if (!other && !this.hasPlace(link)) {
        link.tellRecords(Buffer.alloc(0));
        return link.turnAway("full");
      }
      link.caller.isKnown = true;
      link.greet();
    } else check(expiry > Date.now(), "record of another time");
    if (other && !other.caller !== !link.caller) return this.settle(link, other);
    other?.close();
    link.begin(node);
  }

  hasPlace({ canBeDialled }) {
    const others = this.links.filter((link) => link.isOpen && link.canBeDialled === canBeDialled);
    return others.length < (canBeDialled ? DIALLED_PLACES : HOME_PLACES);
  }

  // Both ends dialled: the link that the smaller node id dialled stays, and the other one ends 2 s later. What was said
  // on that one is not repeated.
  settle(link, other) {
    const isOursSmaller = nodeId(this.identity.publicKey) < nodeId(Buffer.from(link.node, "hex"));
    const [stays, goes] = isOursSmaller === !link.caller ? [link, other] : [other, link];
    say("two links", { stays: stays.caller ? "theirs" : "ours" });
    goes.isSurplus = link.isLive = true;
    link.isGreeting = false;
    if (goes === other) {
      link.topics = other.topics;
      for (const want of this.wants.values()) {
        if (want.holders.delete(other)) want.holders.add(link);
        if (want.asked === other) want.asked = link;
      }
    }
    setTimeout(() => goes.close(), HELLO_MS);
  }

  takeManifest(bytes) {
    check(this.invite && sha256(bytes).equals(this.invite.hash), "another manifest");
    this.manifest = openManifest(bytes);
    this.limit = this.manifest.limit;
    say("manifest", { name: this.invite.name });
  }

  lose(link) {
    this.links = this.links.filter((other) => other !== link);
    this.lack(link, [...this.wants.keys()]);
  }

  tick(now) {
    for (const link of this.links) link.tick(now);
    this.quota.forgetFull();
    for (const [id, frame] of this.held) if (timeOf(frame) < now - MAX_AGE_MS) this.drop(id);
    for (const [id, want] of this.wants) if (want.since < now - MAX_AGE_MS) this.wants.delete(id);
    this.ask([...this.wants].filter(([, want]) => want.asked && want.again <= now).map(([id]) => id));
  }

  // docs/protocol.md#have-and-want. What a node holds in part is announced again once it holds all.
  choose(link, ids, sizes, topics, signers, parts) {
    const isWhole = (_, i) => !parts[i]?.length && sizes[i] <= this.limit + HEAD_BYTES + 9;
    const idle = [];
    for (const id of split(ids).filter(isWhole)) {
      if (this.held.has(id) || (!this.wants.has(id) && this.wants.size >= MAX_WANTS)) continue;
      const want = this.want(id, link);
      if (!want.asked) idle.push(id);
    }
    this.ask(idle);
  }

  want(id, link) {
    const nothing = { asked: null, pending: new Set(), again: 0, chunks: [] };
    if (!this.wants.has(id)) this.wants.set(id, { ...nothing, holders: new Set(), since: Date.now() });
    const want = this.wants.get(id);
    want.holders.add(link);
    return want;
  }

  // Ask for items or their OUTLINEs, or for chunks that are missing once the OUTLINE is here. The holder that was asked
  // moves to the end, so that another one is asked if it does not answer.
  ask(ids) {
    const asked = new Map(); // lists of [id, missing], by link
    for (const id of ids) {
      const want = this.wants.get(id);
      const [holder] = want.holders;
      if (want.asked && want.asked !== holder && want.pending.size)
        want.asked.tell(CANCEL, join([id]), [[...want.pending]]);
      want.asked = holder ?? null;
      if (!holder) continue;
      want.holders.delete(holder);
      want.holders.add(holder);
      const missing = [...(want.hashes ?? []).keys()].filter((index) => !want.chunks[index]).slice(0, MAX_INDICES);
      want.pending = new Set(missing);
      want.again = Date.now() + SILENT_HOLDER_MS;
      asked.set(holder, [...(asked.get(holder) ?? []), [id, missing]]);
    }
    for (const [link, list] of asked)
      for (let i = 0; i < list.length; i += MAX_IDS) {
        const part = list.slice(i, i + MAX_IDS);
        link.tell(WANT, join(part.map(([id]) => id)), part.map(([, missing]) => missing));
      }
  }

  // The link does not have these (any more).
  lack(link, ids) {
    const idle = ids.filter((id) => this.wants.get(id)?.holders.delete(link) && this.wants.get(id).asked === link);
    for (const id of idle) Object.assign(this.wants.get(id), { asked: null, pending: new Set() });
    this.ask(idle);
  }

  // The link is busy with these, or with all that we asked it for.
  wait(link, ids) {
    for (const [id, want] of this.wants)
      if (want.asked === link && (!ids.length || ids.includes(id)))
        want.again = Date.now() + (ids.length ? BUSY_MS : SILENT_HOLDER_MS);
  }

  take({ id, signer, body, time }, frame, link) {
    check(time > Date.now() - MAX_AGE_MS && time < Date.now() + MAX_AHEAD_MS, "stale");
    if (this.held.has(id)) return;
    let content = body.subarray(9);
    if (body[8] === 1) {
      check(statedSize(content) <= this.limit, "oversized");
      content = decompress(content, new Uint8Array(statedSize(content)));
    }
    check(body[8] <= 1 && content.length <= this.limit, "malformed");
    say("item", {
      id, signer: signer.toString("hex"), topic: body.subarray(0, 8).toString("hex"), bytes: content.length,
      sha256: sha256(content).toString("hex"),
    });
    const holders = this.wants.get(id)?.holders ?? new Set();
    this.wants.delete(id);
    this.keep(id, Buffer.from(frame), (other) => other !== link && !holders.has(other));
  }

  // Keep an item, and offer it to the live links that `lacks` names. Our own items stay if there are too many.
  keep(id, frame, lacks) {
    this.held.set(id, frame);
    this.heldBytes += frame.length;
    for (const [old, other] of this.held) {
      if (this.heldBytes <= MAX_HELD_BYTES) break;
      if (!other.subarray(0, 32).equals(this.identity.publicKey)) this.drop(old);
    }
    if (this.held.has(id)) for (const link of this.links) if (link.isOpen && lacks(link)) link.announce([id]);
  }

  drop(id) {
    this.heldBytes -= this.held.get(id).length;
    this.held.delete(id);
  }

  takeOutline(link, head, hashes) {
    const { id, digest, size } = openHead(head, this.swarm);
    link.tell(ACK, join([id]), [[]]);
    check(sha256(hashes).equals(digest), "forged");
    check(hashes.length === 32 * Math.max(1, Math.ceil(size / CHUNK_BYTES)) && size <= this.limit + 9, "malformed");
    if (this.held.has(id) || this.wants.get(id)?.hashes) return;
    const coming = [...this.wants.values()].reduce((sum, { head }) => sum + (head?.readUInt32BE(132) ?? 0), 0);
    check(coming + size <= MAX_COMING_BYTES, "no room");
    Object.assign(this.want(id, link), { head, hashes: cut(hashes, 32) });
    this.ask([id]);
  }

  takeChunk(id, index, data, link) {
    const want = this.wants.get(id);
    if (!want?.hashes || want.chunks[index]) return;
    check(want.hashes[index]?.equals(sha256(data)), "false chunk");
    want.chunks[index] = data;
    want.again = Date.now() + SILENT_HOLDER_MS;
    if (want.chunks.filter(Boolean).length === want.hashes.length)
      link.openSealed(Buffer.concat([want.head, ...want.chunks]));
    else if (want.pending.delete(index) && !want.pending.size) this.ask([id]); // all of those came
  }

  publish(content, topic = NO_TOPIC) {
    const frame = this.seal(ITEM, Buffer.concat([topic, Buffer.from([0]), content]));
    const id = idOf(frame);
    this.keep(id, frame, () => true);
    return id;
  }

  // The frame that answers a WANT: a chunk, or if no index was named the item, or its outline if it is large.
  answer(id, index) {
    const frame = this.held.get(id);
    if (!frame) return control(DONT_HAVE, pack([join([id])]));
    const body = frame.subarray(HEAD_BYTES);
    if (index !== null) return control(CHUNK, Buffer.concat([join([id]), u16(index), chunksOf(body)[index]]));
    if (body.length <= CHUNK_BYTES) return frame;
    return control(OUTLINE, pack([frame.subarray(0, HEAD_BYTES), hashesOf(body)]));
  }
}

const [what, seed = crypto.randomBytes(32).toString("hex"), endpoint] = process.argv.slice(2);
const isInvite = /^gossamer:\/\/[^/]+\/[^/]+\/[^/]+@/.test(what);
if (!/^[0-9a-f]{64}$/.test(seed) || isInvite !== !endpoint) {
  console.error("usage: node peer.mjs gossamer://NAME/... [SEED]\n       node peer.mjs MANIFEST SEED HOST:PORT");
  process.exit(2);
}
const swarm = isInvite ? { invite: parseInvite(what) } : { manifest: openManifest(fs.readFileSync(what)) };
const peer = new Peer(new Identity(Buffer.from(seed, "hex")), swarm);
readline.createInterface({ input: process.stdin }).on("line", (line) => {
  const [verb, value, topic] = line.split(" ");
  const publish = () => peer.publish(fs.readFileSync(value), topic && Buffer.from(topic, "hex"));
  if (verb === "dial") {
    const [endpoint, key] = value.split("?key=");
    peer.dial({ endpoint, key: Buffer.from(key, "hex") }).catch(() => {});
  }
  if (verb === "publish") say("published", { file: value, id: publish() });
  if (verb === "send") peer.links[0]?.send(Buffer.from(value, "hex"));
  if (verb === "receive") peer.links[0]?.receive(Buffer.from(value, "hex"));
}).on("close", () => process.exit(0));
for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, () => process.exit(0));
if (endpoint) await peer.listen(endpoint);
else {
  await peer.dial(peer.invite.seed);
  process.exit(1); // the connection ended before our input did
}
