// Listening for peer.mjs, as docs/protocol.md asks of a peer that listens: CURVE, the proven key of each connection, and
// 10 s and 256 KiB for a caller until it is answered.
//
// The package zeromq does not say which CURVE key sent a message: it hides the User-Id that our ZAP handler attaches. So
// each TCP connection gets a ZeroMQ socket of its own, which listens in a private folder, and its bytes are passed on.
// The ZAP domain is the number of that socket. So the handler (ZeroMQ RFC 27) knows whose key it is asked about, and the
// connection of one peer can be closed. The socket is a DEALER, which speaks with one peer as a ROUTER does.

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
//     socket     the ZeroMQ socket that reads and writes its messages
//     key        the CURVE key that it has proved, 32 bytes; set before its first message comes
//     address    its IP address
//     isKnown    false; whoever welcomed it sets this once it is answered
//     close()    end the connection once what was sent has left
//     onClose()  called when the connection has ended; whoever welcomed it may set this
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
    connection.on("error", () => {}); // "close" follows
    const strangers = [...callers.values()].filter((caller) => !caller.isKnown).length;
    if (strangers >= MAX_STRANGERS) return connection.destroy();
    const domain = String(++count), file = path.join(folder, domain);
    const socket = new Dealer({ ...options, curveServer: true, zapDomain: domain, linger: FLUSH_MS });
    const caller = { socket, key: null, address: connection.remoteAddress ?? "", isKnown: false, onClose() {} };
    callers.set(domain, caller);
    caller.close = () => { if (!socket.closed) socket.close(); setTimeout(() => connection.destroy(), FLUSH_MS); };
    await socket.bind(`ipc://${file}`);
    const inner = net.connect(file).on("error", () => connection.destroy()).on("end", () => connection.end());
    connection.on("data", () => {
      if (!caller.isKnown && connection.bytesRead > STRANGER_BYTES) connection.destroy();
    });
    connection.pipe(inner).pipe(connection);
    setTimeout(() => { if (!caller.isKnown) connection.destroy(); }, STRANGER_MS).unref();
    const ended = () => {
      if (!callers.delete(domain)) return;
      inner.destroy();
      if (!socket.closed) socket.close();
      fs.rmSync(file, { force: true });
      caller.onClose();
    };
    connection.on("close", ended);
    if (connection.destroyed) return ended(); // while the socket was bound
    welcome(caller);
  });
  await new Promise((resolve, reject) => server.on("error", reject).listen(Number(port), host, resolve));
  return server.address().port;
}

// CURVE asks here about the key of each connection (ZeroMQ RFC 27). Everybody may come in; what may be said is decided
// by the HELLO. Without a handler CURVE would take everybody too, and we would not know who it is.
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
