// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"io"
	"net/http"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

// A fast-path client's bulk response is not copied either.
func TestClientConnWriterSplices(t *testing.T) {
	from, in := socketPair(t)
	if _, err := in.Write(make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	result := make(chan error, 1)
	c := dialRaw(t, serveBelow(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["Content-Length"] = []string{"1000"}
		w.WriteHeader(http.StatusOK)
		if err := conntest.RefuseSplice(unix.EPERM); err != nil {
			t.Error(err)
		}
		_, err := w.(io.ReaderFrom).ReadFrom(io.LimitReader(from, 1000))
		result <- err
	}))
	c.get("http://x/", "")
	if err := <-result; !errors.Is(err, unix.EPERM) {
		t.Errorf("ReadFrom without splice: %v", err)
	}
}
