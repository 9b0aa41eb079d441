// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// aloneTests are tests that have a process to themselves, because they take long or look at the whole
// process. The longest come first.
var aloneTests = []string{
	"TestBinaryReadme",
	"TestProcessClosesTunnelsOfDeafClients",
	"TestTunnels",
	"TestDocumentedCommands",
	"TestProcessReloadsUnderTraffic",
	"TestTunnelsBehindTheProxyProtocol",
	"TestClientsThatNeverRead",
	"TestAdminAPI",
	"TestHistory",
	"TestTunnelsOutliveCaddysStallLimits",
	"TestCommandStatusOnATerminal",
	"TestParentStreamsIndependent",
	"TestBinaryChurn",
	"TestRulesOfPeers",
	"TestBinaryOverTLS",
	"TestProcessExitsWithStuckTunnels",
	"TestProcessExitsWithLiveTunnels",
	"TestBinaryIdle",
	"TestClientConnReloadUnderTraffic",
	"TestClientConnRequests",
	"TestParentSquid",
	"TestTunnelsOfAServerForHTTP1",
	"TestRefusalsOfEagerClients",
	"TestStreamSteadyReader",
	"TestStreamSteadyOrigin",
	"TestBinaryExit",
	"TestCommandSaysWhoMayUseIt",
	"TestCommandIntroducesItself",
	"TestCommandExplainMistakes",
	"TestCommandExplain",
	"TestCommandRefusals",
	"TestBinaryRules",
	"TestBinaryReload",
	"TestTunnelsOutliveAReload",
	"TestSlowReadersAreNeitherIdleNorStalled",
	"TestTunnelsOfOneConnectionDoNotWaitForEachOther",
	"TestTunnelsLeaveNothingBehind",
	"TestProcessExitsWithClientConns",
	"TestProcessExitsAfterLastResponse",
	"TestProcessExitsAfterEarlyResponse",
	"TestStreamLarge",
	"TestStreamStalledReader",
	"TestStreamSlowRequest",
	"TestCommand",
	"TestUnroutable",
	"TestSpellings",
	"TestOwnAddresses",
	"TestNearbyAddresses",
	"TestRebinding",
	"TestSearchList",
	"TestProcessSplicesOnClientConns",
	"TestProcessWithSilentTarget",
	"TestProcessExitsDuringDials",
	"TestBinaryDescriptors",
	"TestCommandStatusSelects",
	"TestCommandStatus",
	"TestBinaryCommands",
	"TestWarningsAboutDescriptors",
	"TestWarningsAboutEvictions",
	"TestWarningsOfAConfig",
	"TestWarningsOfTheProcess",
	"TestTopTargets",
	"TestLogTable",
}

// processes is for runs whose -run selects many tests.
var processes = flag.Int("processes", 0, "how many processes run the tests; 0: four or more, but one with -run and the like")

// There is only one Caddy per process, so that the tests of a process run one after the other, though
// they mostly wait. The main process therefore starts several others, which run a part of the tests
// each. The environment tells them their part.
const (
	partEnv  = "ASYNC_PROXY_TEST_PART"  // the first port: this process runs a part of the tests
	caddyEnv = "ASYNC_PROXY_TEST_CADDY" // the path at which cmd/caddy is, or will be if a test needs it
)

// inParts reports whether this is the main process of a run in several processes.
func inParts() bool {
	if os.Getenv(partEnv) != "" || testing.CoverMode() != "" || *processes == 1 {
		return false
	}
	for _, name := range []string{"run", "list", "fuzz", "count", "cpu", "bench", "shuffle", "cpuprofile", "memprofile", "blockprofile", "mutexprofile", "trace"} {
		f := flag.Lookup("test." + name)
		selects := name == "run" && *processes > 0 && !strings.Contains(f.Value.String(), "/")
		if f.Value.String() != f.DefValue && !selects {
			return false
		}
	}
	return true
}

// runParts runs the tests in other processes, and returns the status to exit with.
func runParts() (code int) {
	dir, err := os.MkdirTemp("", "async-proxy-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	parts, err := testParts()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if os.Getenv(caddyEnv) == "" {
		_ = os.Setenv(caddyEnv, filepath.Join(dir, "caddy"))
	}
	var all sync.WaitGroup
	var printing sync.Mutex
	var next atomic.Int64
	deadline := time.Time{}
	if timeout := flag.Lookup("test.timeout").Value.(flag.Getter).Get().(time.Duration); timeout > 0 {
		deadline = time.Now().Add(timeout)
	}
	for range cmp.Or(*processes, max(4, runtime.GOMAXPROCS(0))) {
		all.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(parts)); i = next.Add(1) - 1 {
				output, err := runPart(parts[i], nextPort.Load()+64*i, deadline)
				printing.Lock()
				if err != nil {
					fmt.Printf("%s%s: %v\n", output, strings.Join(parts[i], ", "), err)
					code = 1
				} else if testing.Verbose() {
					fmt.Printf("%s", output)
				}
				printing.Unlock()
			}
		})
	}
	all.Wait()
	return code
}

// testParts returns the selected tests: each of aloneTests alone, the others together.
func testParts() (parts [][]string, err error) {
	const together = 10
	list := exec.Command(os.Args[0], "-test.list="+cmp.Or(flag.Lookup("test.run").Value.String(), "."))
	output, err := list.Output()
	if err != nil {
		return nil, fmt.Errorf("listing the tests: %w", err)
	}
	skip, err := regexp.Compile(cmp.Or(flag.Lookup("test.skip").Value.String(), "^$"))
	if err != nil {
		return nil, err
	}
	names := slices.DeleteFunc(strings.Fields(string(output)), func(name string) bool {
		return strings.HasPrefix(name, "Benchmark") || skip.MatchString(name)
	})
	for _, name := range aloneTests {
		if i := slices.Index(names, name); i >= 0 {
			names = slices.Delete(names, i, i+1)
			parts = append(parts, []string{name})
		}
	}
	return slices.AppendSeq(parts, slices.Chunk(names, together)), nil
}

// runPart runs some of the tests in a process of their own. A part that hangs ends before the deadline
// of this process, if there is one: the output then has the stacks of the part.
func runPart(names []string, port int64, deadline time.Time) (output []byte, err error) {
	data, err := os.MkdirTemp("", "async-proxy-data") // Caddy fails if several processes make its CA in one directory
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(data)
	flags := append(flagsForAll(), "-test.run=^("+strings.Join(names, "|")+")$")
	ctx := context.Background()
	if !deadline.IsZero() {
		left := max(time.Until(deadline)-30*time.Second, time.Second)
		flags = append(flags, "-test.timeout="+left.String())
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, left+10*time.Second) // for a part that hangs outside its tests
		defer cancel()
	}
	cmd := exec.CommandContext(ctx, os.Args[0], flags...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGQUIT) }
	cmd.WaitDelay = 5 * time.Second // a program that the part has left running may have its output
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", partEnv, port), "XDG_DATA_HOME="+data)
	alive, err := cmd.StdinPipe() // the other process ends with this one, however that ends
	if err != nil {
		return nil, err
	}
	defer alive.Close()
	return cmd.CombinedOutput()
}

// endWithMain ends this process, which runs a part of the tests, with the main process. Processes that
// the tests start are no parts.
func endWithMain() {
	_ = os.Unsetenv(partEnv)
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}()
}

// flagsForAll returns the flags of this process that matter to every process.
func flagsForAll() (flags []string) {
	flag.Visit(func(f *flag.Flag) {
		if name, standard := strings.CutPrefix(f.Name, "test."); f.Name != "processes" &&
			(!standard || slices.Contains([]string{"timeout", "short", "skip", "v", "parallel", "failfast", "fullpath"}, name)) {
			flags = append(flags, "-"+f.Name+"="+f.Value.String())
		}
	})
	return flags
}
