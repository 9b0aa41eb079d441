// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"net/http"
	"testing"
	"testing/synctest"
)

// A queue passes on its contents before it ends, drops what exceeds its size, and reports a
// panic to the caller of end.
func TestInterimQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got []int
		slow := make(chan struct{})
		q := &interimQueue{clock: new(headClock), write: func(status int, _ http.Header) { <-slow; got = append(got, status) }}
		for range 3 * maxInterimWaiting {
			if err := q.got1xx(http.StatusEarlyHints, nil); err != nil {
				t.Fatal(err)
			}
		}
		go close(slow)
		q.end()
		if n := len(got); n < maxInterimWaiting || n > maxInterimWaiting+1 {
			t.Errorf("%d responses were passed on", n)
		}
		q.sendContinue() // must not block
		if err := q.got1xx(http.StatusEarlyHints, nil); err != nil || q.writing != nil {
			t.Errorf("it continues after its end: %v", err)
		}
		q = &interimQueue{clock: new(headClock), write: func(int, http.Header) { panic("wrong") }}
		_ = q.got1xx(http.StatusEarlyHints, nil)
		q.sendContinue()
		defer func() {
			if recover() != "wrong" {
				t.Error("the panic was lost")
			}
		}()
		q.end()
	})
}
