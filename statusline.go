// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"net/http"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
)

// giveReason puts the sentence of f into the status line of the response to a CONNECT over HTTP/1,
// because that is all that most programs show of the response. If an error route responds with another
// status, the status line has the registered phrase. If toEnd is not nil, the caller must write the
// response itself, and then call toEnd.EndHijacked.
func (p *proxy) giveReason(w http.ResponseWriter, r *http.Request, f *refusal) (toEnd *downstream.Writer) {
	if r.Method != http.MethodConnect || r.ProtoMajor != 1 {
		return nil
	}
	writer := downstream.WriterOf(w)
	if writer == nil {
		writer, toEnd = p.takeResponse(w, r)
	}
	if writer != nil {
		writer.SetReason(f.status, reasonPhrase(f.text))
	}
	return toEnd
}

// takeResponse replaces net/http's writer of the response to r, which cannot set a reason phrase, by
// the writer of the fast path. It hijacks the connection, which must close after the response in any
// case. The new writer goes below Caddy's writer for write_idle, so that all other writers, such as
// those of access logs and header operations, stay in effect. Without write_idle, takeResponse returns
// nil, because no other writer of Caddy's can be given a new one below it.
//
// The response must be ended when it is complete. Usually the end of r's context does that, because
// net/http ends the context when all handlers have returned. If the client has half-closed, net/http
// has ended it already. Then toEnd is not nil, and the caller must end the response. Error routes
// cannot do that, so with error routes takeResponse returns nil for such a client, whose response
// then has the registered phrase.
func (p *proxy) takeResponse(w http.ResponseWriter, r *http.Request) (writer, toEnd *downstream.Writer) {
	_, idle := caddyhttp.IdleTimeoutsFromContext(r.Context())
	if idle == nil || hasErrorRoutes(r) && r.Context().Err() != nil {
		return nil, nil
	}
	header := w.Header()
	conn, _, err := hijack(w)
	if err != nil {
		return nil, nil
	}
	server := &downstream.Server{WriteIdleTimeout: idle.Deadline.Timeout, MaxWriteChunk: idle.MaxChunk, Lingering: &p.process.lingering}
	writer = server.NewWriter(conn, r, header)
	idle.ResponseWriterWrapper.ResponseWriter = writer
	if r.Context().Err() != nil { // final: net/http no longer reads from the connection
		return writer, writer
	}
	context.AfterFunc(r.Context(), writer.EndHijacked)
	return writer, nil
}

// maxPhrase is the maximum length of a reason phrase in bytes. Programs show it on one line, after
// some words of their own.
const maxPhrase = 100

// reasonPhrase returns a sentence as the reason phrase of a status line (RFC 9112 §4): printable
// ASCII without the full stop, maxPhrase bytes at most. If the sentence is longer, its longest word,
// which is nearly always the name of the destination, loses its middle. If it is still too long, it
// loses its end.
func reasonPhrase(sentence string) string {
	phrase := strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, strings.TrimSuffix(sentence, "."))
	if len(phrase) > maxPhrase {
		phrase = shortenWord(phrase, len(phrase)-maxPhrase)
	}
	if len(phrase) > maxPhrase {
		phrase = phrase[:maxPhrase-len(omission)] + omission
	}
	return phrase
}

const (
	omission = "..."
	minWord  = 24 // a shortened word has at least this length, so that it is still recognizable
)

// shortenWord makes the longest word of a text shorter by the given number of bytes, or down to
// minWord if that is less. It leaves out the middle of the word.
func shortenWord(text string, by int) string {
	start, length := 0, 0
	for at := 0; at < len(text); {
		n := len(text) - at
		if i := strings.IndexByte(text[at:], ' '); i >= 0 {
			n = i
		}
		if n > length {
			start, length = at, n
		}
		at += n + 1
	}
	keep := max(length-by, min(length, minWord)) - len(omission)
	if keep+len(omission) >= length {
		return text
	}
	return text[:start+keep/2] + omission + text[start+length-(keep-keep/2):]
}

// quoted returns a text of printable ASCII as a string of a structured field (RFC 9651 §3.3.3).
func quoted(text string) string {
	return `"` + quoteEscapes.Replace(text) + `"`
}

var quoteEscapes = strings.NewReplacer(`\`, `\\`, `"`, `\"`)
