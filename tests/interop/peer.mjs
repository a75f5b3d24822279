// A small peer of Gossamer in JavaScript, as an example for those who write one in another language. It was written
// from docs/protocol.md and docs/swarms.md alone. No part of the node uses it.
//
//     node peer.mjs INVITE [SEED]        SEED: 64 hex digits, the peer's private key; drawn at random without it
//
// It dials the invite's first node, takes every item, and prints what happens as lines of JSON. It obeys lines on its
// standard input:
//
//     publish FILE [TOPIC]   sign the file's bytes as an item and offer it; TOPIC has 16 hex digits
//     send HEX               send these bytes as they are
//     receive HEX            treat these bytes as if the node had sent them
//
// It leaves out what a peer may: it listens nowhere, has one link, learns no addresses, relays nothing, and obeys no
// revocation list.

import crypto from "node:crypto";
import fs from "node:fs";
import readline from "node:readline";
import { decode, encode } from "@msgpack/msgpack";
import { decompress } from "fzstd";
import { Dealer } from "zeromq";

// docs/protocol.md#kinds
const HELLO = 1, PING = 3, PONG = 4, HAVE = 5, WANT = 6, ITEM = 7, DONT_HAVE = 8, BUSY = 9, GOODBYE = 11;
const INTEREST = 13, ASK_MANIFEST = 14, MANIFEST = 15, OUTLINE = 18, CHUNK = 19;

const VERSION = 0x0300; // major x 256 + minor
const HEAD_BYTES = 168; // of an envelope, before its body
const CHUNK_BYTES = 128 * 1024, MAX_INDICES = 16; // that a WANT may name
const MAX_ITEM_BYTES = 16 * 1024 * 1024; // unpacked, until the manifest says otherwise
const HELLO_MS = 2000, AGAIN_MS = 2000; // between two HELLOs; until we ask again after BUSY
const RECORD_LIFE_MS = 24 * 3600 * 1000, MAX_AGE_MS = 3600 * 1000, MAX_AHEAD_MS = 600 * 1000;
const NO_TOPIC = Buffer.alloc(8);

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
const unpack = (bytes) => decode(bytes, { useBigInt64: true });

// Keys: docs/protocol.md#keys. node:crypto takes raw keys in their DER frames only.
const DER = { ed25519: "302e020100300506032b657004220420", x25519: "302e020100300506032b656e04220420" };
const privateKey = (kind, raw) =>
  crypto.createPrivateKey({ key: Buffer.concat([Buffer.from(DER[kind], "hex"), raw]), format: "der", type: "pkcs8" });
const rawPublic = (key) => crypto.createPublicKey(key).export({ format: "der", type: "spki" }).subarray(-32);
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

// The points of small order, with two encodings each of y = 0 and y = 1: anybody can sign as such a key. OpenSSL takes
// them. libsodium refuses them, as Gossamer does. The highest bit is the sign of x, which does not matter.
const SMALL_ORDER = new Set([
  "00".repeat(32), "01" + "00".repeat(31), "ec" + "ff".repeat(30) + "7f", "ed" + "ff".repeat(30) + "7f",
  "ee" + "ff".repeat(30) + "7f", "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
  "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
]);

function isSmall(point) {
  const bytes = Buffer.from(point);
  bytes[31] &= 0x7f;
  return SMALL_ORDER.has(bytes.toString("hex"));
}

function isSigned(publicKey, signature, ...parts) {
  if (isSmall(publicKey) || isSmall(signature.subarray(0, 32))) return false;
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
  const [name, manifest, seeds, grant] = text.trim().replace("gossamer://", "").split("/");
  const [key, endpoint] = seeds.split(",")[0].split("@");
  const hash = Buffer.from(manifest, "base64url");
  const [kind, fields] = grant ? unpack(Buffer.from(grant, "base64url")) : [];
  return {
    name, hash, swarm: hash.subarray(0, 16), kind, fields, uses: kind === 3 ? fields[1] : 1,
    seed: { key: Buffer.from(key, "base64url"), endpoint: `tcp://${endpoint}` },
  };
}

// The grant of our record: none, the invite's pass, or a ticket of the invite key (docs/swarms.md#who-is-admitted).
function grantOf({ kind, fields, swarm }, identity, number) {
  if (kind !== 3) return kind ? pack([kind, fields]) : Buffer.alloc(0);
  const [seed, uses, expiry, signature] = fields;
  const key = new Identity(seed);
  const use = key.sign(domain("gossamer/ticket/1"), swarm, u32(number), identity.publicKey);
  return pack([2, [key.publicKey, uses, expiry, signature, number, use]]);
}

class Peer {
  constructor(identity, invite) {
    this.identity = identity;
    this.invite = invite;
    this.swarm = invite.swarm;
    this.started = BigInt(Date.now()) << 16n;
    this.number = crypto.randomInt(invite.uses); // of the invite
    this.tries = 1; // of its numbers
    this.limit = MAX_ITEM_BYTES;
    this.isLive = false;
    this.held = new Map(); // whole items by id in hex: the frames as their signers made them
    this.coming = new Map(); // large items by id: { head, hashes, chunks }
    this.sending = Promise.resolve();
  }

  // docs/protocol.md#peer-record. Each record that we sign has a larger incarnation than the one before.
  record() {
    const payload = pack([
      1, this.swarm, this.identity.curveKey, [], this.started++, "peer.mjs", BigInt(Date.now() + RECORD_LIFE_MS),
      grantOf(this.invite, this.identity, this.number), [],
    ]);
    return Buffer.concat([this.identity.publicKey, this.identity.sign(domain("gossamer/record/1"), payload), payload]);
  }

  // Dial, say hello until the node says its own, and handle what it sends, until the connection ends.
  async run() {
    this.socket = new Dealer({
      curveServerKey: z85(this.invite.seed.key), curvePublicKey: z85(this.identity.curveKey),
      curveSecretKey: z85(this.identity.curveSecret), linger: 0, reconnectInterval: -1,
    });
    this.socket.events.on("disconnect", () => { say("lost"); this.socket.close(); });
    this.socket.connect(this.invite.seed.endpoint);
    this.greet();
    this.greeting = setInterval(() => this.greet(), HELLO_MS);
    for await (const parts of this.socket) this.receive(Buffer.concat(parts));
  }

  greet() { // 1: we are needy, as we cannot be dialled and have no peer. 0: we obey no revocation list.
    this.send(seal(this.identity, this.swarm, HELLO, pack([this.record(), 1, 0])));
  }

  send(frame) {
    this.sending = this.sending.then(() => this.socket.send(frame)).catch(() => {}); // the connection has ended
  }

  tell(kind, ...fields) { this.send(control(kind, pack(fields))); }

  receive(frame) {
    try {
      if (frame.subarray(0, 8).equals(MAGIC)) this.hear(frame.readUInt16BE(8), frame.subarray(10));
      else this.openSealed(frame);
    } catch (error) {
      say("refused", { why: error.message });
    }
  }

  openSealed(frame) {
    const envelope = open(frame, this.swarm);
    if (envelope.kind === HELLO) this.welcome(envelope);
    else if (envelope.kind === ITEM) this.take(envelope, frame);
    else if (envelope.kind === GOODBYE) this.leave(unpack(envelope.body)[0]);
  }

  // The record in the HELLO binds the node's key to the CURVE key that the connection has proved.
  welcome({ signer, body }) {
    const [record] = unpack(body);
    check(record.subarray(0, 32).equals(signer), "hello with the record of another");
    const payload = record.subarray(96);
    check(isSigned(signer, record.subarray(32, 96), domain("gossamer/record/1"), payload), "forged");
    const [version, swarm, curveKey, , , , expiry] = unpack(payload);
    check(version === 1 && this.swarm.equals(swarm) && expiry > Date.now(), "record of another swarm or time");
    check(this.invite.seed.key.equals(curveKey), "record of another connection");
    if (this.isLive) return; // the answer to a HELLO that we repeated
    this.isLive = true;
    clearInterval(this.greeting);
    say("live", { node: signer.toString("hex") });
    this.tell(INTEREST, 1, Buffer.alloc(0), 0); // every topic, and pushes
    this.send(control(ASK_MANIFEST, Buffer.alloc(0)));
    this.held.forEach((frame, id) => this.announce(id));
  }

  hear(kind, body) {
    if (kind === CHUNK) return this.takeChunk(body.toString("hex", 0, 32), body.readUInt16BE(32), body.subarray(34));
    if (kind === PING) return this.tell(PONG, unpack(body)[0]);
    if (kind === HAVE) return this.choose(...unpack(body));
    if (kind === WANT) return this.give(...unpack(body));
    if (kind === OUTLINE) return this.takeOutline(...unpack(body));
    if (kind === MANIFEST) return this.takeManifest(unpack(body)[0]);
    if (kind === BUSY) return split(unpack(body)[0]).forEach((id) => setTimeout(() => this.ask(id), AGAIN_MS));
    if (kind === GOODBYE) return this.leave(unpack(body)[0]);
    // The rest does not concern a peer of one link. Kinds that we do not know are of a newer version.
  }

  leave(reason) {
    if (reason === "invite_used" && this.tries++ < this.invite.uses) {
      this.number = (this.number + 1) % this.invite.uses;
      return this.greet();
    }
    clearInterval(this.greeting);
    say("goodbye", { reason });
  }

  takeManifest(manifest) {
    check(sha256(manifest).equals(this.invite.hash), "another manifest");
    this.limit = Number(unpack(manifest.subarray(96))[7][0]);
    say("manifest", { name: this.invite.name });
  }

  // docs/protocol.md#have-and-want. What a node holds in part is announced again once it holds all.
  choose(ids, sizes, topics, signers, parts) {
    const isWhole = (_, i) => !parts[i]?.length && sizes[i] <= this.limit + HEAD_BYTES + 9;
    split(ids).filter(isWhole).forEach((id) => this.ask(id));
  }

  // Ask for an item or its OUTLINE; for chunks that are missing, once the OUTLINE is here.
  ask(id) {
    if (this.held.has(id)) return;
    const { hashes = [], chunks } = this.coming.get(id) ?? {};
    const missing = [...hashes.keys()].filter((index) => !chunks[index]).slice(0, MAX_INDICES);
    this.tell(WANT, join([id]), [missing]);
  }

  take({ id, signer, body, time }, frame) {
    check(time > Date.now() - MAX_AGE_MS && time < Date.now() + MAX_AHEAD_MS, "stale");
    if (this.held.has(id)) return;
    let content = body.subarray(9);
    if (body[8] === 1) {
      check(statedSize(content) <= this.limit, "oversized");
      content = decompress(content, new Uint8Array(statedSize(content)));
    }
    check(body[8] <= 1 && content.length <= this.limit, "malformed");
    this.held.set(id, Buffer.from(frame));
    say("item", {
      id, signer: signer.toString("hex"), topic: body.subarray(0, 8).toString("hex"), bytes: content.length,
      sha256: sha256(content).toString("hex"),
    });
  }

  takeOutline(head, hashes) {
    const { id, digest, size } = openHead(head, this.swarm);
    check(sha256(hashes).equals(digest), "forged");
    check(hashes.length === 32 * Math.max(1, Math.ceil(size / CHUNK_BYTES)) && size <= this.limit + 9, "malformed");
    if (this.held.has(id) || this.coming.has(id)) return;
    this.coming.set(id, { head, hashes: cut(hashes, 32), chunks: [] });
    this.ask(id);
  }

  takeChunk(id, index, data) {
    const item = this.coming.get(id);
    if (!item || item.chunks[index]) return;
    check(item.hashes[index]?.equals(sha256(data)), "false chunk");
    item.chunks[index] = data;
    const count = item.chunks.filter(Boolean).length;
    if (count === item.hashes.length) {
      this.coming.delete(id);
      this.openSealed(Buffer.concat([item.head, ...item.chunks]));
    } else if (count % MAX_INDICES === 0) this.ask(id); // all of those came
  }

  publish(content, topic = NO_TOPIC) {
    const frame = seal(this.identity, this.swarm, ITEM, Buffer.concat([topic, Buffer.from([0]), content]));
    const { id } = openHead(frame.subarray(0, HEAD_BYTES), this.swarm);
    this.held.set(id, frame);
    if (this.isLive) this.announce(id);
    return id;
  }

  announce(id) {
    const frame = this.held.get(id);
    const hint = sha256(frame.subarray(0, 32)).subarray(0, 4); // of the signer
    this.tell(HAVE, join([id]), [frame.length], frame.subarray(HEAD_BYTES, HEAD_BYTES + 8), hint, []);
  }

  // Each item that is asked for is answered: by its frame, its outline, its chunks, or DONT_HAVE.
  give(ids, indices) {
    for (const [i, id] of split(ids).entries()) {
      const frame = this.held.get(id);
      const chunks = frame && chunksOf(frame.subarray(HEAD_BYTES));
      const asked = (indices[i] ?? []).filter((index) => index < chunks?.length);
      if (!frame) this.tell(DONT_HAVE, join([id]));
      else if (asked.length) {
        for (const index of asked) this.send(control(CHUNK, Buffer.concat([join([id]), u16(index), chunks[index]])));
      } else if (chunks.length === 1) this.send(frame);
      else this.tell(OUTLINE, frame.subarray(0, HEAD_BYTES), hashesOf(frame.subarray(HEAD_BYTES)));
    }
  }
}

const [invite, seed] = process.argv.slice(2);
if (!/^gossamer:\/\/[^/]+\/[^/]+\/[^/]+@/.test(invite)) {
  console.error("usage: node peer.mjs gossamer://NAME/... [SEED]");
  process.exit(2);
}
const peer = new Peer(new Identity(seed ? Buffer.from(seed, "hex") : crypto.randomBytes(32)), parseInvite(invite));
readline.createInterface({ input: process.stdin }).on("line", (line) => {
  const [verb, value, topic] = line.split(" ");
  const publish = () => peer.publish(fs.readFileSync(value), topic && Buffer.from(topic, "hex"));
  if (verb === "publish") say("published", { file: value, id: publish() });
  if (verb === "send") peer.send(Buffer.from(value, "hex"));
  if (verb === "receive") peer.receive(Buffer.from(value, "hex"));
}).on("close", () => process.exit(0));
await peer.run();
process.exit(1); // the connection ended before our input did
