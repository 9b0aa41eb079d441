// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"io"
	"net/http"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// passOn hands a request that is not for the proxy to the next handler.
func (h *Handler) passOn(w http.ResponseWriter, r *http.Request, from caller, next caddyhttp.Handler) (int, error) {
	prior := r.Header["X-Forwarded-For"]
	h.setRequestFields(r, from)
	if from.trusted && h.ForwardedFor != "off" {
		// A reverse_proxy appends the peer itself.
		if r.Header["X-Forwarded-For"] = prior; len(prior) == 0 {
			delete(r.Header, "X-Forwarded-For")
		}
	}
	recorder := &statusRecorder{ResponseWriterWrapper: caddyhttp.ResponseWriterWrapper{ResponseWriter: w}}
	err := next.ServeHTTP(recorder, r)
	if err == nil && recorder.status == 0 && isExtendedConnect(r) {
		// Caddy's own answer would be an empty 200, which says that the other
		// protocol is spoken from here on (RFC 8441 §5).
		return 0, refuse(http.StatusNotImplemented, "proxy_internal_response", nil, "Nothing here speaks the protocol that this CONNECT asks for.")
	}
	return recorder.status, err
}

// statusRecorder notes the status for the log. Unlike Caddy's recorders it does
// not stand between a connection that is taken over and its socket.
type statusRecorder struct {
	caddyhttp.ResponseWriterWrapper
	status int
}

func (w *statusRecorder) WriteHeader(status int) {
	if w.status < 200 {
		w.status = status
	}
	w.ResponseWriterWrapper.WriteHeader(status)
}

func (w *statusRecorder) Write(p []byte) (int, error) {
	w.wroteBody()
	return w.ResponseWriterWrapper.Write(p)
}

func (w *statusRecorder) ReadFrom(r io.Reader) (int64, error) {
	w.wroteBody()
	return w.ResponseWriterWrapper.ReadFrom(r)
}

func (w *statusRecorder) wroteBody() {
	if w.status < 200 {
		w.status = http.StatusOK
	}
}
