// How peer.mjs listens, as docs/protocol.md asks: with CURVE, so that it knows the proven key of each connection. A
// caller has 10 s and 256 KiB until it is answered.
//
// The package zeromq hides the User-Id that a ZAP handler attaches, so a ROUTER could not tell whose key sent a
// message. Here each TCP connection gets a ZeroMQ socket of its own, at a file in a private folder, and its bytes are
// passed on. The socket's ZAP domain is a number, by which the handler (ZeroMQ RFC 27) knows whose key it is asked
// about. So we can also close the connection of a single peer. The socket is a DEALER: with one peer it speaks as a
// ROUTER does.

import fs from "node:fs";
import net from "node:net";
import os from "node:os";
import path from "node:path";
import { Dealer, Reply } from "zeromq";

const STRANGER_MS = 10_000, STRANGER_BYTES = 256 * 1024; // until a caller is answered
const MAX_STRANGERS = 64; // at once
const FLUSH_MS = 2000; // for a GOODBYE to leave

// Listen at HOST:PORT, and call `welcome(caller)` for each connection. A caller has
//
//     socket        the ZeroMQ socket that reads and writes its messages
//     key           the CURVE key that it has proved, 32 bytes; set before its first message comes
//     address       its IP address
//     isKnown       false; who welcomed it sets this once it has been answered
//     close()       end the connection once what was sent has left
//     onClose(why)  called when the connection has ended, with an error's text or none; who welcomed it may set this
//
// `options` are those of each ZeroMQ socket. Returns the port.
export async function listen(endpoint, options, welcome) {
  const [, host, port] = /^\[?(.*?)\]?:(\d+)$/.exec(endpoint);
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "peer-")); // only this user may enter it
  process.on("exit", () => fs.rmSync(folder, { recursive: true, force: true }));
  const callers = new Map(); // by ZAP domain
  await proveKeys(callers);
  let count = 0;

  const server = net.createServer({ keepAlive: true }, async (connection) => {
    let why = "";
    connection.on("error", (error) => { why = error.message; }); // "close" follows
    const strangers = [...callers.values()].filter((caller) => !caller.isKnown).length;
    if (strangers >= MAX_STRANGERS) return connection.destroy();
    const domain = String(++count), file = path.join(folder, domain);
    const socket = new Dealer({ ...options, curveServer: true, zapDomain: domain, linger: FLUSH_MS });
    const caller = { socket, key: null, address: connection.remoteAddress ?? "", isKnown: false, onClose() {} };
    callers.set(domain, caller);
    caller.close = () => { if (!socket.closed) socket.close(); setTimeout(() => connection.destroy(), FLUSH_MS); };
    try {
      await socket.bind(`ipc://${file}`);
    } catch {
      connection.destroy(); // too many sockets
    }
    const inner = net.connect(file).on("error", () => connection.destroy()).on("end", () => connection.end());
    const cut = (why) => { if (!caller.isKnown && !connection.destroyed) connection.destroy(new Error(why)); };
    connection.on("data", () => { if (connection.bytesRead > STRANGER_BYTES) cut("too much before hello"); });
    connection.pipe(inner).pipe(connection);
    setTimeout(cut, STRANGER_MS, "too long before hello").unref();
    const ended = () => {
      if (!callers.delete(domain)) return;
      inner.destroy();
      if (!socket.closed) socket.close();
      fs.rmSync(file, { force: true });
      caller.onClose(why);
    };
    connection.on("close", ended);
    if (connection.destroyed) return ended(); // while the socket was bound
    welcome(caller);
  });
  await new Promise((resolve, reject) => server.on("error", reject).listen(Number(port), host, resolve));
  return server.address().port;
}

// CURVE asks here about the key of each connection. Every key may come in: the HELLO shows who is admitted. Without a
// handler every key would come in too, and we would not know it.
async function proveKeys(callers) {
  const handler = new Reply();
  await handler.bind("inproc://zeromq.zap.01");
  (async () => {
    for await (const [version, request, domain, , , mechanism, key] of handler) {
      const caller = callers.get(domain.toString());
      const isGood = caller && !caller.key && mechanism.toString() === "CURVE";
      if (isGood) caller.key = Buffer.from(key);
      await handler.send([version, request, isGood ? "200" : "400", "", "", ""]);
    }
  })();
}
