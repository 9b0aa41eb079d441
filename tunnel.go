// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// Why a tunnel ended, as it stands in its closing line.
const (
	reasonClient      = "client closed" // the client was the first to say that it was done
	reasonTarget      = "target closed"
	reasonClientError = "client error" // such as a reset
	reasonTargetError = "target error"
)

// tunnel joins a client and a target: what one of them writes the other reads,
// until both are done or one fails.
type tunnel struct {
	client netip.Addr
	target string // as the client named it
	proto  string // of the client's request
	start  time.Time
	logger *zap.Logger

	near, far peer   // the client and the target
	greeting  []byte // goes to the client before anything from the target
	early     []byte // what the client sent before it was greeted

	up, down atomic.Int64 // bytes from the client and to it

	once   sync.Once
	reason string // why it ended
}

// run relays until the tunnel has ended. It takes the calling goroutine for
// what goes to the client and one more for what comes from there.
func (t *tunnel) run() {
	t.logOpened()
	upDone := make(chan struct{})
	go t.relayUp(upDone)
	t.relayDown()
	<-upDone
	_ = t.near.Close()
	_ = t.far.Close()
	t.logClosed()
}

// relayUp passes on what the client says. Like relayDown it has a name, so that
// it has one in a dump of goroutines.
func (t *tunnel) relayUp(done chan<- struct{}) {
	defer close(done)
	n, err := t.far.Write(t.early)
	t.early = nil
	t.up.Add(int64(n))
	if err != nil {
		t.directionEnded(t.far, t.near, nil, err)
		return
	}
	readErr, writeErr := relay(t.far.writer(), t.near.reader(), &t.up)
	t.directionEnded(t.far, t.near, readErr, writeErr)
}

// relayDown passes on what the target says.
func (t *tunnel) relayDown() {
	_, err := t.near.Write(t.greeting)
	t.greeting = nil
	if err != nil {
		t.directionEnded(t.near, t.far, nil, err)
		return
	}
	readErr, writeErr := relay(t.near.writer(), t.far.reader(), &t.down)
	t.directionEnded(t.near, t.far, readErr, writeErr)
}

// directionEnded passes the end of one direction on. An orderly end, src saying
// that it is done, leaves the other direction open. A failure of either side is
// made known to the other one as a failure, so that nobody takes what came
// before it for the whole (RFC 9110 §9.3.6, RFC 9113 §8.5).
func (t *tunnel) directionEnded(dst, src peer, readErr, writeErr error) {
	end, srcError, dstError := reasonClient, reasonClientError, reasonTargetError
	if src == t.far {
		end, srcError, dstError = reasonTarget, reasonTargetError, reasonClientError
	}
	switch {
	case writeErr != nil:
		t.ended(dstError)
		_ = src.Abort()
		_ = dst.Close()
	case readErr == io.EOF, errors.Is(readErr, net.ErrClosed): // closed: by ourselves
		t.ended(end)
		_ = dst.CloseWrite()
	default:
		t.ended(srcError)
		_ = dst.Abort()
		_ = src.Close()
	}
}

// ended notes why the tunnel ended. What happens first is the reason; the rest
// follows from it.
func (t *tunnel) ended(reason string) {
	t.once.Do(func() { t.reason = reason })
}

// close ends the tunnel for a reason of the proxy's own.
func (t *tunnel) close(reason string) {
	t.ended(reason)
	_ = t.near.Close()
	_ = t.far.Close()
}
