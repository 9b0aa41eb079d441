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

// giveReason puts the sentence of f into the status line of the response to a CONNECT over HTTP/1.
// Programs show the user nothing else of that response. If an error route responds with another
// status, that has its usual phrase. If toEnd is not nil, the caller must respond itself, and then call
// its EndHijacked.
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

// takeResponse has the response to r written as on the fast path, because net/http cannot set a reason
// phrase. It hijacks the connection, which must close after the response in any case, and puts
// the fast path's writer in place of net/http's, below the one of Caddy's that implements
// write_idle. All other writers, such as those of access logs and of header operations, are above it.
// It returns nil without write_idle, because nothing else of Caddy's can be given another writer.
//
// The response ends with the context of r, which net/http ends when all handlers have returned. But
// net/http has ended it before if the client has half-closed. The response is then toEnd, too, and
// must not be left to error routes, whose end cannot be known. So if there are any, they respond
// with the usual phrase to a client that has half-closed.
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

// maxPhrase is the maximum length of a reason phrase in bytes. Programs show it in one line, behind
// words of their own.
const maxPhrase = 100

// reasonPhrase returns a sentence as the reason phrase of a status line (RFC 9112 §4): printable
// ASCII without the full stop, maxPhrase bytes at most. If that is too little, the longest word, which
// is nearly always the name of the destination, loses its middle. Only if that is not enough, the
// sentence loses its end.
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
	minWord  = 24 // what is left of a word must still tell which it was
)

// shortenWord makes the longest word of a text so much shorter by leaving out its middle, but not
// shorter than minWord.
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
