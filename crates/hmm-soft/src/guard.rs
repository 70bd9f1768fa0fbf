//! Accesses that must not end the process.
//!
//! Memory that a kernel uses in place is the program's: a file may be truncated
//! under it, a mapping may go. A CPU thread that touches it then gets SIGBUS or
//! SIGSEGV, and so would a worker. [`attempt`] runs an access so that the signal
//! ends the access instead: the handler lets [`hmm_soft_guarded`] return at once.
//! Signals that have nothing to do with this go on to whoever had them before.
//!
//! The handler is installed when a kernel is launched for the first time, and
//! again on top when the program has put its own there meanwhile.

#[cfg(target_arch = "x86_64")]
pub(crate) use imp::{install, prepare};

/// What a signal said about an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signalled {
    /// SIGBUS: the mapping has nothing to show there.
    Bus,
    /// SIGSEGV: there is no such mapping, or it does not allow the access.
    Segv,
}

/// Other machines have no guard yet; see `docs/limits.md`.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn install() {}

/// The same.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn prepare() {}

/// Runs an access. It must be one that can be left at any instruction: no
/// destructors, no locks.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn attempt<R>(access: impl Fn() -> R) -> Result<R, Signalled> {
    Ok(access())
}

#[cfg(target_arch = "x86_64")]
pub(crate) use imp::attempt;

#[cfg(target_arch = "x86_64")]
mod imp {
    use std::cell::{Cell, UnsafeCell};
    use std::ffi::{c_int, c_void};
    use std::mem::MaybeUninit;
    use std::ptr;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::Signalled;

    // hmm_soft_guarded(stack: *mut usize, call: fn(*mut c_void), data: *mut c_void) -> c_int
    //
    // Notes the stack pointer, calls, and returns 0. The handler sets the stack
    // pointer back to what was noted and goes on at hmm_soft_guard_fails, with the
    // signal's number in eax: as if the call had returned, with that.
    std::arch::global_asm!(
        ".globl hmm_soft_guarded",
        ".hidden hmm_soft_guarded",
        ".type hmm_soft_guarded,@function",
        "hmm_soft_guarded:",
        "    push rbp",
        "    push rbx",
        "    push r12",
        "    push r13",
        "    push r14",
        "    push r15",
        "    sub rsp, 8",
        "    mov [rdi], rsp",
        "    mov rdi, rdx",
        "    call rsi",
        "    xor eax, eax",
        ".globl hmm_soft_guard_fails",
        ".hidden hmm_soft_guard_fails",
        "hmm_soft_guard_fails:",
        "    add rsp, 8",
        "    pop r15",
        "    pop r14",
        "    pop r13",
        "    pop r12",
        "    pop rbx",
        "    pop rbp",
        "    ret",
        ".size hmm_soft_guarded, . - hmm_soft_guarded",
    );

    unsafe extern "C" {
        fn hmm_soft_guarded(
            stack: *mut usize,
            call: unsafe extern "C" fn(*mut c_void),
            data: *mut c_void,
        ) -> c_int;
        /// Not a function: where to go on.
        fn hmm_soft_guard_fails();
    }

    const SIGNALS: [c_int; 2] = [libc::SIGBUS, libc::SIGSEGV];

    thread_local! {
        /// Where this thread's guarded access has noted its stack pointer; 0
        /// outside of one.
        static STACK: Cell<usize> = const { Cell::new(0) };
    }

    /// Handlers that were there before: each time that the program has put one on
    /// top of ours, ours goes on top of that. No more than so many times.
    const SAVED: usize = 8;

    struct Before {
        saved: [UnsafeCell<MaybeUninit<libc::sigaction>>; SAVED],
        count: AtomicUsize,
    }

    // SAFETY: a place is written once, before the count includes it, by whoever
    // holds the lock of `install`; below the count it is only read.
    unsafe impl Sync for Before {}

    static BEFORE: [Before; 2] = [const {
        Before {
            saved: [const { UnsafeCell::new(MaybeUninit::zeroed()) }; SAVED],
            count: AtomicUsize::new(0),
        }
    }; 2];

    impl Before {
        /// False when there is no more room.
        fn push(&self, action: libc::sigaction) -> bool {
            let count = self.count.load(Ordering::SeqCst);
            let Some(place) = self.saved.get(count) else {
                return false;
            };
            // SAFETY: above the count, and one thread at a time.
            unsafe { (*place.get()).write(action) };
            self.count.store(count + 1, Ordering::SeqCst);
            true
        }

        /// The one that was there `depth` installations ago.
        fn get(&self, depth: usize) -> Option<libc::sigaction> {
            let index = self.count.load(Ordering::SeqCst).checked_sub(depth + 1)?;
            // SAFETY: below the count.
            Some(unsafe { (*self.saved[index].get()).assume_init_read() })
        }
    }

    thread_local! {
        /// A signal that this thread is handing on: how many handlers it has been
        /// through, and where on the stack. Handlers hand it on in turn, perhaps to
        /// ours again.
        static HANDED_ON: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
    }

    /// Runs an access. It must be one that can be left at any instruction: no
    /// destructors, no locks.
    pub(crate) fn attempt<R, F: Fn() -> R>(access: F) -> Result<R, Signalled> {
        struct Call<'a, F, R> {
            access: &'a F,
            result: MaybeUninit<R>,
        }
        unsafe extern "C" fn call<F: Fn() -> R, R>(data: *mut c_void) {
            // SAFETY: `data` is the structure below, and nobody else has it.
            let call = unsafe { &mut *data.cast::<Call<'_, F, R>>() };
            call.result.write((call.access)());
        }
        let mut data = Call {
            access: &access,
            result: MaybeUninit::uninit(),
        };
        STACK.with(|stack| {
            // SAFETY: the function writes its stack pointer to the cell and calls
            // `call` with the data, which lives until it has returned. Frames that
            // are left on the way have nothing to clean up.
            let signal = unsafe {
                let (stack, data) = (stack.as_ptr(), ptr::from_mut(&mut data).cast());
                hmm_soft_guarded(stack, call::<F, R>, data)
            };
            stack.set(0);
            match signal {
                // SAFETY: the call has returned, so the result was written.
                0 => Ok(unsafe { data.result.assume_init_read() }),
                libc::SIGBUS => Err(Signalled::Bus),
                _ => Err(Signalled::Segv),
            }
        })
    }

    /// Makes sure that the accesses of a thread of the engine's can be guarded:
    /// it may have been started with all signals blocked. Cheap when they can.
    pub(crate) fn prepare() {
        thread_local! {
            static UNBLOCKED: Cell<bool> = const { Cell::new(false) };
        }
        install();
        if UNBLOCKED.replace(true) {
            return;
        }
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: the first call writes the set; the mask is this thread's own.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in SIGNALS {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), ptr::null_mut());
        }
    }

    /// Puts the handler in place, on top of what is there.
    pub(crate) fn install() {
        static INSTALLING: Mutex<()> = Mutex::new(());
        let _one = INSTALLING
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        for (signal, before) in SIGNALS.into_iter().zip(&BEFORE) {
            let mut now = MaybeUninit::<libc::sigaction>::zeroed();
            // SAFETY: asks for what is installed; all zeros are a value.
            let now = unsafe {
                if libc::sigaction(signal, ptr::null(), now.as_mut_ptr()) != 0 {
                    continue;
                }
                now.assume_init()
            };
            if now.sa_sigaction == handle as *const () as usize {
                continue;
            }
            if !before.push(now) {
                continue;
            }
            let ours = libc::sigaction {
                sa_sigaction: handle as *const () as usize,
                sa_flags: libc::SA_SIGINFO | libc::SA_ONSTACK | (now.sa_flags & libc::SA_NODEFER),
                ..now
            };
            // SAFETY: the handler does nothing that is not safe in one; what it
            // does not know goes on to the one that was there.
            unsafe { libc::sigaction(signal, &raw const ours, ptr::null_mut()) };
        }
    }

    unsafe extern "C" fn handle(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
        let stack = STACK.get();
        // Sent by somebody, and not by an access: not ours.
        // SAFETY: the kernel gives a handler valid pointers.
        let by_access = unsafe { (*info).si_code } > 0;
        if stack != 0 && by_access {
            STACK.set(0);
            // SAFETY: as above; the registers are those of a point in
            // `hmm_soft_guarded` whose frame is still there.
            unsafe {
                let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
                registers[libc::REG_RSP as usize] = stack.cast_signed() as i64;
                registers[libc::REG_RIP as usize] =
                    (hmm_soft_guard_fails as *const () as usize).cast_signed() as i64;
                registers[libc::REG_RAX as usize] = signal.into();
            }
            return;
        }
        hand_on(signal, info, context, by_access);
    }

    /// Not ours: to whoever had it before, and if there is nobody, to the default.
    fn hand_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void, by_access: bool) {
        let here = ptr::from_ref(&by_access).addr();
        let outer = HANDED_ON.get();
        // A handler that has jumped out of the last one has left it higher up.
        let depth = if here < outer.1 { outer.0 } else { 0 };
        let before = BEFORE[usize::from(signal != SIGNALS[0])].get(depth);
        HANDED_ON.set((depth + 1, here));
        // SAFETY: whoever installed the handler has promised that it can be called
        // so; else the default is restored, and meets the access again.
        unsafe {
            match before.map(|before| (before.sa_sigaction, before.sa_flags)) {
                Some((libc::SIG_IGN, _)) if !by_access => {}
                None | Some((libc::SIG_DFL | libc::SIG_IGN, _)) => {
                    libc::signal(signal, libc::SIG_DFL);
                    if !by_access {
                        libc::raise(signal);
                    }
                }
                Some((next, flags)) if flags & libc::SA_SIGINFO == 0 => {
                    let next: extern "C" fn(c_int) = std::mem::transmute(next);
                    next(signal);
                }
                Some((next, _)) => {
                    let next: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                        std::mem::transmute(next);
                    next(signal, info, context);
                }
            }
        }
        HANDED_ON.set(outer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_that_can_be_done_is_done() {
        prepare();
        assert_eq!(attempt(|| 7), Ok(7));
    }

    #[test]
    #[cfg_attr(not(target_arch = "x86_64"), ignore = "no guard on this machine")]
    fn signals_become_errors() {
        prepare();
        for _ in 0..3 {
            let nowhere = std::ptr::without_provenance::<u64>(16);
            // SAFETY: not sound, which is the point: the guard ends it.
            let read = || unsafe { std::ptr::read_volatile(nowhere) };
            assert_eq!(attempt(read), Err(Signalled::Segv));
        }
        let mut ends = [0u8; 64];
        assert_eq!(
            attempt(|| ends.as_ptr().addr()),
            Ok(ends.as_mut_ptr().addr())
        );
    }
}
