// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"io"
	"net"
	"net/http"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

// A fast-path client's bulk response is not copied either.
func TestClientConnWriterSplices(t *testing.T) {
	from, in := socketPair(t)
	to, _ := socketPair(t)
	if _, err := in.Write(make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	w := &responseWriter{client: newClientConn(unitListener(nil), newReadConn(to.(*net.TCPConn), nil), false)}
	w.reset(false, false)
	w.Header()["Content-Length"] = []string{"1000"}
	w.WriteHeader(http.StatusOK)
	result := make(chan error, 1)
	go func() {
		if err := conntest.RefuseSplice(unix.EPERM); err != nil {
			t.Error(err)
		}
		_, err := w.ReadFrom(io.LimitReader(from, 1000))
		result <- err
	}()
	if err := <-result; !errors.Is(err, unix.EPERM) {
		t.Errorf("ReadFrom without splice: %v", err)
	}
}
