// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"net/http"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// refusal is an answer that the proxy gives itself, since there is none from an
// origin to pass on.
type refusal struct {
	status int
	kind   string // the error type of RFC 9209 §2.3, for the Proxy-Status field
	text   string // one sentence for the person at the other end; no internals
	err    error  // what happened, for the log; may be nil
}

// refuse makes a refusal whose text is formatted.
func refuse(status int, kind string, err error, format string, args ...any) *refusal {
	return &refusal{status: status, kind: kind, err: err, text: fmt.Sprintf(format, args...)}
}

func (f *refusal) Error() string {
	if f.err != nil {
		return f.text + ": " + f.err.Error()
	}
	return f.text
}

func (f *refusal) Unwrap() error { return f.err }

// The values of the fields that a refusal sets. They are shared: net/http reads
// header values and never writes to them.
var (
	plainText = []string{"text/plain; charset=utf-8"}
	closeConn = []string{"close"}
)

// answer gives f to the client: through the site's error routes if there are
// any, else straight away as one line of text. The fields that carry what
// machines need are set in both cases.
//
// A refused CONNECT ends an HTTP/1 connection, as the bytes behind it are
// those of the tunnel that the client meant to have, not another request.
func (h *Handler) answer(w http.ResponseWriter, r *http.Request, f *refusal) error {
	header := w.Header()
	header["Proxy-Status"] = []string{h.name + "; error=" + f.kind}
	if r.Method == http.MethodConnect && r.ProtoMajor == 1 {
		header["Connection"] = closeConn
	}
	server, _ := r.Context().Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if server != nil && server.Errors != nil && len(server.Errors.Routes) > 0 {
		return caddyhttp.Error(f.status, f)
	}
	header["Content-Type"] = plainText
	w.WriteHeader(f.status)
	if r.Method != http.MethodHead {
		_, _ = w.Write(append([]byte(f.text), '\n')) // a client that left has no use for it
	}
	return nil
}
