// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tcpconn

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

// Ask returns once the answer can be read, however soon it arrives.
func TestAsk(t *testing.T) {
	near, far := conntest.Pair(t)
	socket := near.(*net.TCPConn)
	go func() { _, _ = io.Copy(far, struct{ io.Reader }{far}) }()
	question, answer := []byte("question"), make([]byte, 100)
	_ = socket.SetReadDeadline(time.Now().Add(time.Minute))
	for i := range 20_000 {
		if writeErr, waitErr := Ask(socket, question); writeErr != nil || waitErr != nil {
			t.Fatalf("question %d: %v, %v", i, writeErr, waitErr)
		}
		if n, err := io.ReadFull(socket, answer[:len(question)]); n == 0 || err != nil {
			t.Fatalf("answer %d: %d bytes, %v", i, n, err)
		}
	}
}

// The wait keeps to the deadline, ends with the connection, and is not begun when the question cannot
// be sent.
func TestAskFails(t *testing.T) {
	near, far := conntest.Pair(t)
	socket := near.(*net.TCPConn)
	_ = socket.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if writeErr, waitErr := Ask(socket, []byte("x")); writeErr != nil || !errors.Is(waitErr, os.ErrDeadlineExceeded) {
		t.Errorf("without an answer: %v, %v", writeErr, waitErr)
	}
	// On a busy machine the deadline may have passed before the wait begins.
	if writeErr, waitErr := Ask(socket, []byte("x")); writeErr != nil || !errors.Is(waitErr, os.ErrDeadlineExceeded) {
		t.Errorf("after the deadline: %v, %v", writeErr, waitErr)
	}
	_ = far.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.ReadFull(far, make([]byte, 2)); err != nil {
		t.Errorf("reading two questions: %v", err)
	}
	_ = socket.SetReadDeadline(time.Time{})
	go func() {
		_, _ = far.Read(make([]byte, 2))
		_ = far.Close()
	}()
	if writeErr, waitErr := Ask(socket, []byte("x")); writeErr != nil || waitErr != nil {
		t.Errorf("when the connection ends: %v, %v", writeErr, waitErr)
	}
	_ = socket.CloseWrite()
	if writeErr, _ := Ask(socket, []byte("x")); writeErr == nil {
		t.Error("a question on a connection that has ended was sent")
	}
	_ = socket.Close()
	if writeErr, _ := Ask(socket, []byte("x")); !errors.Is(writeErr, net.ErrClosed) {
		t.Errorf("on a closed connection: %v", writeErr)
	}
}
